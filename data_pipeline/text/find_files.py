"""The files of a corpus: those that are named, and those below folders, by what their names say they hold."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from common.errors import UserError
from data_pipeline.left_out import LeftOut, printable
from data_pipeline.text.open_input import COMPRESSIONS, files_at, is_url

SUFFIXES = {".txt": "prose", ".text": "prose", ".md": "prose", ".markdown": "prose", ".rst": "prose", ".tex": "prose",
            ".jsonl": "records", ".ndjson": "records", ".json": "json", ".parquet": "parquet", ".tar": "tar"}
THIRD_PARTY = ("site-packages", "dist-packages")
NO_SUCH_SUFFIX = "another kind of file"


class FileKind(NamedTuple):
    """What is in a file: `code` or a value of SUFFIXES; and how it is compressed, empty when it is not."""

    content: str
    compression: str


class TextFile(NamedTuple):
    """A file to read: its name in keys and messages, and where it is (a URL is a string)."""

    key: str
    location: Path | str


def kind_of(name: str, code_suffixes: Sequence[str]) -> FileKind | None:
    """What a file of this name holds, capital letters being the same as small ones; None when it is not read."""
    name = name.rpartition("/")[2].lower()
    if name.endswith(".tgz"):
        return FileKind("tar", ".gz")
    compression = next((suffix for suffix in COMPRESSIONS if name.endswith(suffix)), "")
    name = name.removesuffix(compression)
    if any(name.endswith(suffix.lower()) and len(name) > len(suffix) for suffix in code_suffixes):
        return FileKind("code", compression)
    content = SUFFIXES.get(os.path.splitext(name)[1])
    if content is None or (content == "parquet" and compression):  # Parquet is compressed inside, and read by seeking
        return None
    return FileKind(content, compression)


def find(paths: Sequence[str | os.PathLike], code_suffixes: Sequence[str]) -> tuple[list[TextFile], LeftOut]:
    """The files to read, in the order of `paths` and in alphabetical order below each, and the others, counted.

    Raises UserError naming every path that does not exist, is of another kind, or holds nothing to read.
    """
    found: list[TextFile] = []
    left_out = LeftOut()
    faults = []
    suffixes = " ".join(sorted({*SUFFIXES, *code_suffixes}))
    for path in paths:
        files, is_folder = _at(path, left_out)
        name = printable(os.fspath(path))
        readable = []
        for file in files:
            if kind_of(file.key, code_suffixes):
                readable.append(file)
            elif is_folder:
                left_out.add(NO_SUCH_SUFFIX, file.key)
        if is_folder:
            if not readable:
                faults.append(f"{name} holds no {suffixes} file, plain or {' '.join(COMPRESSIONS)}")
        elif not files:
            faults.append(f"{name} " + ("is not a regular file" if os.path.lexists(path) else "does not exist"))
        elif not readable:
            faults.append(f"{name} is none of {suffixes}, plain or {' '.join(COMPRESSIONS)}")
        found += readable
    if faults or not found:
        raise UserError("; ".join(faults) or "no input was named")
    return found, left_out


def files_below(root: Path, left_out: LeftOut) -> list[TextFile]:
    """The regular files below a folder by their relative paths, without third-party packages; sorted.

    Raises UserError when a folder there cannot be listed.
    """
    return sorted(TextFile(path.relative_to(root).as_posix(), path) for path in _regular_files(root, left_out))


def _at(path: str | os.PathLike, left_out: LeftOut) -> tuple[list[TextFile], bool]:
    """The files at one path or URL, and whether it is a folder."""
    name = os.fspath(path)
    if is_url(name):
        files = [TextFile(key, url) for key, url in files_at(name)]
        return files, [file.location for file in files] != [name]
    local = Path(name)
    if os.path.isdir(local):
        return files_below(local, left_out), True
    return [TextFile(local.name, local)] if os.path.isfile(local) else [], False


def _regular_files(root: Path, left_out: LeftOut) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root, onerror=_refuse):
        here = Path(folder)
        for name in subfolders:
            where = (here / name).relative_to(root).as_posix()
            if name in THIRD_PARTY:
                left_out.add("a folder of installed packages", where)
            elif os.path.islink(here / name):
                left_out.add("a link to a folder", where)
        subfolders[:] = [name for name in subfolders if name not in (*THIRD_PARTY, "__pycache__")]
        for name in names:
            if os.path.isfile(here / name):
                yield here / name
            else:
                left_out.add("not a regular file", (here / name).relative_to(root).as_posix())


def _refuse(error: OSError) -> None:
    raise UserError(f"cannot read {printable(os.fspath(error.filename))}: {error.strerror}")
