"""Inputs as streams of bytes: local files and URLs, decompressed on the way, and the members of tar files.

Nothing is read whole, and nothing is written to the disk.
"""

import bz2
import gzip
import io
import os
import re
import tarfile
import zlib
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from common.errors import DataError, UserError
from data_pipeline.left_out import LeftOut, printable

COMPRESSIONS = (".gz", ".bz2", ".zst")
MAX_TAR_HEADER_BYTES = 2**20
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(::|://)")
_OTHER_HEADERS = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME,
                  tarfile.GNUTYPE_LONGLINK)


class Damaged(DataError):
    """A file is damaged or cut short: what came before is good, and the rest cannot be read."""


class Member(NamedTuple):
    """A regular file in a tar; `content` can be read until the next member is asked for."""

    name: str
    content: BinaryIO


def is_url(name: str) -> bool:
    """Whether `name` is `scheme://...` rather than a path."""
    return _URL.match(name) is not None


def files_at(url: str) -> list[tuple[str, str]]:
    """(name, URL) of the file, or of every file below the folder, at a URL, in alphabetical order.

    Raises UserError when fsspec has no way there, or nothing is there.
    """
    with _remote(url):
        from fsspec.core import url_to_fs

        system, root = url_to_fs(url)
        if not system.isdir(root):
            if not system.exists(root):
                raise UserError(f"{printable(url)} does not exist")
            return [(root.rstrip("/").rpartition("/")[2], url)]
        folder = root.rstrip("/") + "/"
        return sorted((name.removeprefix(folder), system.unstrip_protocol(name)) for name in system.find(root))


@contextmanager
def opened(location: Path | str, compression: str) -> Iterator[BinaryIO]:
    """The bytes of a file or URL, decompressed (`compression` is one of COMPRESSIONS, or empty).

    Raises:
        Damaged: the content is no such compression, or is cut short.
        UserError, DataError: it cannot be read.
    """
    with _reading(location), _source(location) as source, damage():
        yield decompressed(source, compression)


@contextmanager
def damage() -> Iterator[None]:
    """Turns what decompressors, tarfile and pyarrow raise on damaged content into Damaged."""
    try:
        yield
    except (EOFError, zlib.error, tarfile.TarError) as error:
        raise Damaged(str(error)) from None
    except OSError as error:
        if error.errno is not None:  # of the file system
            raise
        raise Damaged(str(error).partition("\n")[0]) from None


def decompressed(source: BinaryIO, compression: str) -> BinaryIO:
    """A stream of the content; files in several parts (members, frames) are read through."""
    if compression == ".gz":
        return cast(BinaryIO, gzip.open(source))
    if compression == ".bz2":
        return cast(BinaryIO, bz2.open(source))
    if compression == ".zst":
        import pyarrow

        # Unlike the reader of the library zstandard, this one notices that a file is cut short.
        stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(source, mode="r"), "zstd")
        return io.BufferedReader(cast(Any, stream))
    return source


def tar_members(source: BinaryIO, key: str, left_out: LeftOut) -> Generator[Member, None, None]:
    """The regular files of a tar in their order; links, devices and sparse files are counted.

    Raises Damaged when the tar does not end as a tar does: tarfile alone takes a damaged header for the end.
    """
    seen_end = False

    class Header(tarfile.TarInfo):
        @classmethod
        def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "Header":
            nonlocal seen_end
            seen_end = len(buf) == tarfile.BLOCKSIZE and not any(buf)
            header = super().frombuf(buf, encoding, errors)
            if header.type in _OTHER_HEADERS and header.size > MAX_TAR_HEADER_BYTES:
                raise Damaged(f"a header of {header.size:,} bytes")
            return header

    archive = tarfile.open(fileobj=source, mode="r|", tarinfo=Header)  # noqa: SIM115 - only the source holds anything
    while (member := archive.next()) is not None:
        archive.members.clear()  # type: ignore[attr-defined]  # tarfile would keep all of them
        where = f"{key}/{member.name}"
        if member.isreg() and not member.issparse():
            content = archive.extractfile(member)
            assert content is not None  # a regular file has content
            yield Member(member.name, cast(BinaryIO, content))
        elif not member.isdir():
            left_out.add("not a regular file", where)
    if not seen_end:
        raise Damaged(f"no end of a tar at byte {archive.offset:,}")


@contextmanager
def _source(location: Path | str) -> Iterator[BinaryIO]:
    if isinstance(location, Path):
        with open(location, "rb") as file:
            yield file
        return
    with _remote(location):
        import fsspec

        source = fsspec.open(location, "rb").open()
    with source:
        yield source


@contextmanager
def _reading(location: Path | str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        kind = UserError if isinstance(error, PermissionError | FileNotFoundError) else DataError
        raise kind(f"cannot read {printable(os.fspath(location))}: {error.strerror or error}") from None


@contextmanager
def _remote(url: str) -> Iterator[None]:
    """Turns what fsspec raises into an error of ours. Each of its file systems has errors of its own."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"cannot read {printable(url)}: {reason}. URLs are read through fsspec and the package that it "
                        "names for the scheme; otherwise copy the files to this machine") from None
