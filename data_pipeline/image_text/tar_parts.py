"""Images and captions in a tar that somebody else made, read to its very end: what is cut or damaged is told.

tarfile ends in silence at the first header that is not valid, as a reader of streams has to. A loss of all that follows
is found here by what a whole tar ends with: two empty blocks and nothing but zeros behind them.
"""

import bz2
import gzip
import io
import lzma
import os
import stat
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from common.errors import DataError, StorageError, UserError
from data_pipeline.image_text.captions import CAPTION_SUFFIXES, BadCaption, read_caption
from data_pipeline.image_text.join_pairs import kind_fault, suffix_of
from data_pipeline.left_out import LeftOut

END_BYTES = 2 * tarfile.BLOCKSIZE
# tar -b 2048 fills up to a MiB; longer zeros are the rest of a download that did not finish.
MAX_ZEROS_AT_END = 2**20
# Headers of one member together: long names and pax records have a few kB, and are read into memory.
MAX_HEADER_BYTES = 64 * 2**10
MAX_IMAGE_BYTES = 256 * 2**20
MAX_CAPTION_BYTES = 2**20
MAX_CAPTIONS_BYTES = 512 * 2**20  # of one tar, which are held in memory
_CHUNK_BYTES = 2**20
_OPENERS: dict[bytes, Callable[[io.BufferedIOBase], io.BufferedIOBase]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\x00": lambda file: lzma.LZMAFile(cast(BinaryIO, file)),  # noqa: SIM115 - closed with the file in it
}
_UNREADABLE = {b"\x28\xb5\x2f\xfd": "zstandard", b"PK\x03\x04": "zip", b"7z\xbc\xaf": "7-zip"}


class DamagedTar(DataError):
    """A tar that cannot be read to its end; the message says where and why."""


class _Damage(DataError):
    """The reason why reading ends early."""


@dataclass(frozen=True, kw_only=True)
class TarPart:
    """A member of a tar. Its caption was read when the tar was, so that no member is looked for twice."""

    name: str
    place: str
    size_bytes: int
    offset: int
    file: io.BufferedIOBase
    text: str | BadCaption | None = None

    def read(self) -> bytes:
        """Its content. Raises DataError when the tar was changed meanwhile, StorageError when the disk fails."""
        with _reading(self.place):
            self.file.seek(self.offset)
            content = self.file.read(self.size_bytes)
        if len(content) != self.size_bytes:
            raise DamagedTar(f"{self.place}: the tar shrank while it was read")
        return content

    def caption(self) -> str:
        """The caption in it. Raises BadCaption."""
        if not isinstance(self.text, str):
            raise self.text or BadCaption("the caption is empty")
        return self.text


class TarParts(NamedTuple):
    """The members that are whole, and what keeps the tar from being read further."""

    parts: list[TarPart]
    damage: str | None


@contextmanager
def opened_tar(path: Path) -> Iterator[io.BufferedIOBase]:
    """The bytes of a tar, unpacked when it is compressed with gzip, bzip2 or xz.

    Raises UserError for a path that is no regular file or cannot be opened, and for other compressions.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(f"{path} is neither a regular file nor a folder; give a .tar file, or a folder")
        with open(path, "rb") as packed:
            start = packed.read(6)
            packed.seek(0)
            for magic, name in _UNREADABLE.items():
                if start.startswith(magic):
                    raise UserError(f"{path} is a {name} file; unpack it and give the .tar or the folder in it")
            opener = next((opener for magic, opener in _OPENERS.items() if start.startswith(magic)), None)
            yield packed if opener is None else opener(packed)
    except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def tar_parts(file: io.BufferedIOBase, path: Path, left_out: LeftOut) -> TarParts:
    """All members that may be part of a pair; the others are counted.

    Of compressed bytes that turn out to be damaged no member is given: those before the fault may be wrong as well.
    """
    parts: list[TarPart] = []
    try:
        with _reading(str(path)):
            num_members = _read_members(file, path, parts, left_out)
    except StorageError:
        raise
    except EOFError:
        return TarParts(parts, "the compressed bytes are cut off")
    except Exception as error:  # tarfile and the decompressors fail in many ways on damaged bytes
        is_whole = isinstance(file, io.BufferedReader) or (_is_of_the_tar(error) and _can_be_unpacked(file))
        return TarParts(parts if is_whole else [], str(error) or type(error).__name__)
    if not num_members:
        left_out.add("a tar without a member", str(path))
    return TarParts(parts, None)


def _read_members(file: io.BufferedIOBase, path: Path, parts: list[TarPart], left_out: LeftOut) -> int:
    """Appends to `parts` as it goes; returns the number of all members. Raises anything on damaged bytes."""
    bounded = _BoundedReads(file)
    num_members = captions_bytes = last = 0
    with tarfile.open(fileobj=bounded, mode="r:") as archive:
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # it would keep all of them
            num_members += 1
            if member.size < 0 or member.offset_data <= last:
                raise _Damage(f"the header at byte {member.offset:,} is not valid")
            last = member.offset_data
            part = _part(member, file, path, left_out)
            if part:
                captions_bytes += part.size_bytes if part.text is not None else 0
                if captions_bytes > MAX_CAPTIONS_BYTES:
                    raise _Damage(f"more than {MAX_CAPTIONS_BYTES >> 20} MiB of captions")
                parts.append(part)
            bounded.left = MAX_HEADER_BYTES
        _require_end(file, archive.offset)
    return num_members


def _is_of_the_tar(error: Exception) -> bool:
    """True unless a decompressor raised it; tarfile passes on those of zlib as its own."""
    return isinstance(error, (_Damage, tarfile.TarError)) and not str(error).startswith("zlib error")


def _can_be_unpacked(file: io.BufferedIOBase) -> bool:
    """True when compressed bytes are whole, so that what is wrong with the tar in them is no fault of theirs."""
    try:
        while file.read(_CHUNK_BYTES):
            pass
    except EOFError:
        return True  # cut off, and right up to there
    except Exception:  # as above
        return False
    return True


def _part(member: tarfile.TarInfo, file: io.BufferedIOBase, path: Path, left_out: LeftOut) -> TarPart | None:
    """The member when it may be part of a pair, its bytes known to be there; else None, and it is counted."""
    if member.isdir():
        return None
    place = f"{path}/{member.name}"
    if reason := _member_fault(member, left_out):
        left_out.add(reason, place)
        return None
    is_caption = suffix_of(member.name) in CAPTION_SUFFIXES
    text: str | BadCaption | None = None
    file.seek(member.offset_data)
    if is_caption:
        content = file.read(member.size)
        if len(content) < member.size:
            raise _Damage(f"the data of {member.name!r} are cut off")
        try:
            text = read_caption(content, is_json=suffix_of(member.name) == ".json")
        except BadCaption as error:
            text = error
    elif member.size:
        file.seek(member.offset_data + member.size - 1)
        if not file.read(1):
            raise _Damage(f"the data of {member.name!r} are cut off")
    return TarPart(name=member.name, place=place, size_bytes=member.size, offset=member.offset_data,
                   file=file, text=text)


def _member_fault(member: tarfile.TarInfo, left_out: LeftOut) -> str | None:
    if member.issym() or member.islnk():
        return "a link inside a tar, whose target is not read"
    if not member.isreg():
        return "neither a file nor a folder (a device or a pipe inside a tar)"
    if member.issparse():
        return "a file with holes (sparse) inside a tar"
    if reason := kind_fault(member.name, left_out):
        return reason
    return size_fault(suffix_of(member.name), member.size)


def size_fault(suffix: str, size_bytes: int) -> str | None:
    """Why a file of that size is not read; None when it is."""
    if suffix in CAPTION_SUFFIXES:
        return f"a caption of more than {MAX_CAPTION_BYTES >> 20} MiB" if size_bytes > MAX_CAPTION_BYTES else None
    return f"an image of more than {MAX_IMAGE_BYTES >> 20} MiB" if size_bytes > MAX_IMAGE_BYTES else None


def _require_end(file: io.BufferedIOBase, offset: int) -> None:
    """Raises _Damage unless only zeros follow from `offset` on, at least two blocks and not very many."""
    file.seek(offset)
    start = file.read(END_BYTES)
    if len(start) >= tarfile.BLOCKSIZE and start[: tarfile.BLOCKSIZE].strip(b"\0"):
        raise _Damage(f"the header at byte {offset:,} is not valid, so that nothing behind it can be read")
    if len(start) < END_BYTES:
        raise _Damage(f"it is cut off at byte {offset + len(start):,}: the two empty blocks at its end are missing")
    num_zeros = 0
    chunk = start
    while chunk:
        if chunk.strip(b"\0"):
            raise _Damage(f"more follows after its end at byte {offset:,}: a header is lost, or tars were joined with "
                          "`cat` (`tar --concatenate` joins them)")
        num_zeros += len(chunk)
        if num_zeros > MAX_ZEROS_AT_END:
            raise _Damage(f"only zeros follow from byte {offset:,} on: a download that did not finish?")
        chunk = file.read(_CHUNK_BYTES)


class _BoundedReads(io.RawIOBase):
    """What tarfile reads from: headers, of which those of one member have a limit.

    Names and pax records are read whole into memory, and their length is what the tar says it is.
    """

    def __init__(self, file: io.BufferedIOBase) -> None:
        super().__init__()
        self.file, self.left = file, MAX_HEADER_BYTES

    def read(self, num_bytes: int = -1) -> bytes:
        self.left -= num_bytes
        if self.left < 0 or num_bytes < 0:
            raise _Damage(f"the headers of one member have more than {MAX_HEADER_BYTES >> 10} KiB")
        return self.file.read(num_bytes)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()


@contextmanager
def _reading(place: str) -> Iterator[None]:
    """An OSError with a number is the disk's; decompressors raise others without one."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise StorageError(f"cannot read {place}: {os.strerror(error.errno)}") from None
