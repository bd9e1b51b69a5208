"""Lists of images: a .csv, .tsv or .jsonl file with the path of an image and its caption in every row."""

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from common.errors import DataError, UserError
from common.wording import either, listed
from data_pipeline.image_text.captions import BadCaption, checked_caption
from data_pipeline.left_out import LeftOut, printable

LIST_SUFFIXES = (".csv", ".tsv", ".jsonl")
# The names that OpenCLIP, img2dataset and the Hub's folders of images give them, tried in this order.
IMAGE_COLUMNS = ("filepath", "file_name", "image_path", "image", "path")
CAPTION_COLUMNS = ("caption", "title", "text")
MAX_LINE_CHARACTERS = 2**20


@dataclass(frozen=True)
class Columns:
    """Names of the columns that are read; None: the first known name that the list has."""

    image: str | None = None
    caption: str | None = None


ANY_COLUMNS = Columns()


class ListedImage(NamedTuple):
    """One row: the file, its caption, and the place of the row for messages."""

    path: Path
    caption: str
    place: str


def listed_images(path: Path, columns: Columns, left_out: LeftOut) -> Iterator[ListedImage]:
    """The rows in order. A relative path starts at the folder of the list; a row that cannot be used is counted.

    Raises UserError for a list that cannot be opened or lacks a column, DataError for one that is no such table.
    """
    wanted: tuple[str, str] | None = None
    for number, row in _rows(path, left_out):
        place = f"{path}:{number}"
        if path.suffix.lower() != ".jsonl":  # every row has the same columns, so one look is enough
            wanted = wanted or (_column(path, row, columns.image, IMAGE_COLUMNS, option="--image-column"),
                                _column(path, row, columns.caption, CAPTION_COLUMNS, option="--caption-column"))
        else:
            wanted = _keys(path, row, columns)
        image, caption = (row.get(name) for name in wanted)
        if not isinstance(image, str) or not image.strip() or "\0" in image:
            left_out.add("a row of a list without the path of an image", place)
        elif "://" in image:
            left_out.add("an image on the web; fetch it before, for example with img2dataset", f"{place} {image}")
        elif not isinstance(caption, str):
            left_out.add("a row of a list without a caption", place)
        else:
            try:
                yield ListedImage(path.parent / image.strip(), checked_caption(caption), place)
            except BadCaption as error:
                left_out.add(error.message, place)


def _rows(path: Path, left_out: LeftOut) -> Iterator[tuple[int, dict]]:
    """(line, values by column)."""
    try:
        # Bytes that are no UTF-8 become half surrogates, which the check of each caption finds.
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            if path.suffix.lower() == ".jsonl":
                number = 0
                while line := file.readline(MAX_LINE_CHARACTERS):
                    number += 1
                    if len(line) == MAX_LINE_CHARACTERS:
                        raise DataError(f"{path}:{number}: a line of more than {MAX_LINE_CHARACTERS:,} characters")
                    yield from ((number, row) for row in _record(line, f"{path}:{number}", left_out))
            else:
                table = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
                yield from ((table.line_num, row) for row in table)
    except csv.Error as error:
        raise DataError(f"cannot read {path} as a table: {error}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _record(line: str, place: str, left_out: LeftOut) -> Iterator[dict]:
    if not line.strip():
        return
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if isinstance(row, dict):
        yield row
    else:
        left_out.add("a line of a list that is no JSON object", place)


def _keys(path: Path, row: dict, columns: Columns) -> tuple[str, str]:
    """Of a JSON object, which may lack what others have."""
    image = columns.image or next((name for name in IMAGE_COLUMNS if name in row), IMAGE_COLUMNS[0])
    caption = columns.caption or next((name for name in CAPTION_COLUMNS if name in row), CAPTION_COLUMNS[0])
    return image, caption


def _column(path: Path, row: dict, asked: str | None, known: Sequence[str], *, option: str) -> str:
    has = [printable(str(name)) for name in row if name is not None]
    found = next((name for name in ((asked,) if asked else known) if name in row), None)
    if found is None:
        raise UserError(f"{path} has the columns {listed(has)}, and none of the name "
                        f"{asked or either(known)}; name it with {option}")
    return found
