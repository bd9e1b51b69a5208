"""Pairs of image and caption from what people have: folders of files, tars, and lists of images."""

import errno
import glob
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from braceexpand import braceexpand

from common.errors import DataError, StorageError, UserError
from data_pipeline.image_text.captions import BadCaption, read_caption
from data_pipeline.image_text.image_lists import ANY_COLUMNS, LIST_SUFFIXES, Columns, listed_images
from data_pipeline.image_text.images import IMAGE_SUFFIXES, BadImage, suffix_of_format
from data_pipeline.image_text.join_pairs import Joined, Part, joined, kind_fault, suffix_of
from data_pipeline.image_text.pair_writer import RawPair
from data_pipeline.image_text.tar_parts import DamagedTar, opened_tar, size_fault, tar_parts
from data_pipeline.left_out import LeftOut, printable

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
IMG2DATASET_SUFFIXES = (".parquet", "_stats.json")
# A file that is named, and not there or not ours to read; anything else is the disk's.
_NOT_READABLE = {
    errno.ENOENT: "a link to nothing, or a file that vanished",
    errno.ELOOP: "a link that goes in a circle",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.ENAMETOOLONG: "a name that is too long",
    errno.ENOTDIR: "a path through a file",
}
_WILDCARDS = "*?["
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)")
MAX_NAMES = 1_000_000  # of one range in braces, which is held in memory


class BadFile(DataError):
    """A file that cannot be read; the message is the reason, the same for every file of that kind."""


@dataclass(frozen=True)
class FilePart:
    """A file of a folder."""

    name: str
    path: Path
    size_bytes: int

    @property
    def place(self) -> str:
        """Its path."""
        return str(self.path)

    def read(self) -> bytes:
        """Its content. Raises BadFile, and StorageError when the disk fails."""
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise _bad_file(error, self.path) from None

    def caption(self) -> str:
        """The text in it. Raises BadCaption, and as `read`."""
        return read_caption(self.read(), is_json=suffix_of(self.name) == ".json")


class _Found(NamedTuple):
    """What a folder holds, in order of name."""

    parts: list[FilePart]
    tars: list[Path]


def expand_inputs(inputs: Sequence[Path]) -> list[Path]:
    """The paths that are meant: `{00000..00012}` and wildcards are expanded, unless a file has that very name.

    Raises UserError for a path that is not there.
    """
    found: list[Path] = []
    for path in inputs:
        if os.path.lexists(path):
            found.append(path)
            continue
        if any(abs(int(end) - int(begin)) > MAX_NAMES for begin, end in _RANGE.findall(str(path))):
            raise UserError(f"cannot read {path}: a range in braces has more than {MAX_NAMES:,} names")
        try:
            names = braceexpand(str(path)) if "{" in str(path) else [str(path)]
            for name in names:
                matches = sorted(glob.glob(name)) if any(sign in name for sign in _WILDCARDS) else [name]
                if not matches or not os.path.lexists(matches[0]):
                    raise UserError(f"cannot read {printable(name)}: No such file or directory")
                found += map(Path, matches)
        except ValueError:
            raise UserError(f"cannot read {path}: a brace in it has no partner, and there is no such file") from None
    return found


def raw_pairs(inputs: Iterable[Path], left_out: LeftOut, *, columns: Columns = ANY_COLUMNS,
              skip_damaged: bool = False) -> Iterator[RawPair]:
    """The pairs of all inputs, in the order given; every other file and member is counted in `left_out`.

    Args:
        inputs: tars, folders (of images with captions beside them, of tars, or both) and lists of images.
        columns: of the lists.
        skip_damaged: a damaged tar is read as far as it is whole and named in `left_out.damaged`.

    Raises UserError for a path that cannot be read or when there is no pair at all, DamagedTar at the first damaged
    tar unless `skip_damaged`, StorageError when the disk fails.
    """
    num_pairs = 0
    for path in inputs:
        for pair in _pairs_of(path, left_out, columns, skip_damaged):
            num_pairs += 1
            yield pair
    if not num_pairs:
        reasons = "".join(f"\n  left out {line}" for line in left_out.lines())
        reasons += "".join(f"\n  {line}" for line in left_out.remarks())
        error = DataError if left_out.damaged else UserError
        raise error(f"there is no pair of image and caption in the input{reasons or ': it is empty'}")


def _pairs_of(path: Path, left_out: LeftOut, columns: Columns, skip_damaged: bool) -> Iterator[RawPair]:
    if path.is_dir():
        found = _files_of(path, left_out)
        yield from _used(joined(found.parts, left_out, by_first_dot=False), left_out)
        for tar in found.tars:
            yield from _tar_pairs(tar, left_out, skip_damaged)
    elif path.suffix.lower() in LIST_SUFFIXES:
        yield from _list_pairs(path, columns, left_out)
    else:
        yield from _tar_pairs(path, left_out, skip_damaged)


def _tar_pairs(path: Path, left_out: LeftOut, skip_damaged: bool) -> Iterator[RawPair]:
    with opened_tar(path) as file:
        found = tar_parts(file, path, left_out)
        if found.damage:
            fault = f"cannot read {path} as a tar file: {printable(found.damage)}"
            if not skip_damaged:
                raise DamagedTar(f"{fault}; fetch it again, or use what stands before the damage (--skip-damaged)")
            left_out.damaged.append(fault)
        yield from _used(joined(found.parts, left_out, by_first_dot=True), left_out)


def _list_pairs(path: Path, columns: Columns, left_out: LeftOut) -> Iterator[RawPair]:
    for row in listed_images(path, columns, left_out):
        try:
            size_bytes = _size_of(row.path)
        except BadFile as error:
            left_out.add(error.message, f"{row.place} {row.path}")
            continue
        pair = _raw_pair(FilePart(row.path.name, row.path, size_bytes), row.caption, left_out)
        if pair:
            yield pair


def _used(pairs: Iterable[Joined], left_out: LeftOut) -> Iterator[RawPair]:
    """The pairs with a caption and an image that can be used."""
    for image, captions in pairs:
        reasons = []
        for text in captions:
            try:
                caption = text.caption()
                break
            except (BadCaption, BadFile) as error:
                reasons.append((error.message, text.place))
        else:
            left_out.add(*reasons[0])
            continue
        pair = _raw_pair(image, caption, left_out)
        if pair:
            yield pair


def _raw_pair(image: Part, caption: str, left_out: LeftOut) -> RawPair | None:
    """None, and the image is counted, when its header shows that it cannot be used."""
    try:
        reason = size_fault(suffix_of(image.name), image.size_bytes)
        if reason:
            raise BadFile(reason)
        content = image.read()
        return RawPair(os.path.splitext(image.place)[0], suffix_of_format(content), content, caption)
    except BadFile as error:
        left_out.add(error.message, image.place)
    except BadImage as error:
        left_out.add(error.reason, f"{image.place} ({error})")
    return None


def _files_of(folder: Path, left_out: LeftOut) -> _Found:
    """All files below a folder; what is no regular file, and what has another kind of name, is counted."""
    found = _Found([], [])
    folders = [folder]
    while folders:
        try:
            with os.scandir(folders.pop()) as entries:
                ordered = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(f"cannot read {error.filename}: {error.strerror}") from None
        names = {entry.name for entry in ordered}
        for entry in ordered:
            path = Path(entry.path)
            if entry.is_dir(follow_symlinks=False):
                folders.append(path)
                if suffix_of(entry.name) in IMAGE_SUFFIXES:
                    left_out.add("a folder with the name of an image; the files in it are looked at", entry.path)
                continue
            try:
                size_bytes = _size_of(path)
            except BadFile as error:
                left_out.add(error.message, entry.path)
                continue
            _sort_in(path, path.relative_to(folder).as_posix(), size_bytes, names, found=found, left_out=left_out)
    return _Found(sorted(found.parts, key=lambda part: part.name.split("/")), sorted(found.tars))


def _sort_in(path: Path, name: str, size_bytes: int, beside: set[str], *, found: _Found, left_out: LeftOut) -> None:
    is_macs = path.name.startswith("._")
    stem = next((path.name.removesuffix(end) for end in IMG2DATASET_SUFFIXES if path.name.endswith(end)), None)
    if path.name.lower().endswith(TAR_SUFFIXES) and not is_macs:
        found.tars.append(path)
    elif stem is not None and any(stem + suffix in beside for suffix in TAR_SUFFIXES):
        left_out.add("a table or statistics of img2dataset beside its tar", str(path))
    elif suffix_of(name) in LIST_SUFFIXES and not is_macs:
        left_out.add("a list inside a folder; to read a list, give it as an --input of its own", str(path))
    else:
        reason = kind_fault(name, left_out) or size_fault(suffix_of(name), size_bytes)
        if reason:
            left_out.add(reason, str(path))
        else:
            found.parts.append(FilePart(name, path, size_bytes))


def _size_of(path: Path) -> int:
    """Bytes of a regular file, or of one that a link leads to. Raises BadFile, and StorageError when the disk fails."""
    try:
        status = path.stat()
    except OSError as error:
        raise _bad_file(error, path) from None
    if stat.S_ISDIR(status.st_mode):
        raise BadFile("a folder (or a link to one) where a file is expected")
    if not stat.S_ISREG(status.st_mode):
        raise BadFile("neither a file nor a folder (a pipe, socket or device)")
    return status.st_size


def _bad_file(error: OSError, path: Path) -> BadFile | StorageError:
    reason = _NOT_READABLE.get(error.errno or 0)
    return BadFile(reason) if reason else StorageError(f"cannot read {path}: {error.strerror or error}")


def inputs_of(inputs: Sequence[Path], columns: Columns = ANY_COLUMNS, skip_damaged: bool = False) -> str:
    """Names, sizes and times of all input files, and the choices: tells whether the same pairs would be written."""
    found = [file for path in inputs for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    files = [(file, file.stat()) for file in found if file.is_file()]
    choices = [choice for choice in (columns.image, columns.caption, skip_damaged or None) if choice is not None]
    return json.dumps([[str(file), status.st_size, status.st_mtime_ns] for file, status in files] + choices)
