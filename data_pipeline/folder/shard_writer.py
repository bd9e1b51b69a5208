"""Writing tar shards and their indexes, into a folder that gets its name when it is complete."""

import errno
import fcntl
import hashlib
import importlib.metadata
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from webdataset import TarWriter

from common.errors import DataError
from data_pipeline.folder.shard_reader import TAR_BLOCK_BYTES

LOCK_NAME = "writer.lock"
DEFAULT_SHARD_BYTES = 64 * 2**20


class _HashingFile:
    """A file that takes the hash of what is written to it on the way."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.sha256 = hashlib.sha256()

    def write(self, content: bytes) -> int:
        self.sha256.update(content)
        return self.file.write(content)


class ShardWriter:
    """One tar file, written by webdataset, and the index of its members."""

    def __init__(self, folder: Path, number: int) -> None:
        self.path = folder / f"shard-{number:06d}.tar"
        self.index_path = folder / f"shard-{number:06d}.index.npy"
        self.payload_bytes = 0
        self.rows: list[tuple[int, ...]] = []
        self._end = 0
        self._file = open(self.path, "xb")  # noqa: SIM115 - closed by finish(), or with the process when it failed
        self._hashing = _HashingFile(self._file)
        # One owner, one mode, one time for every member: the bytes then depend on the documents only.
        self._tar = TarWriter(self._hashing, user="trainyard", group="trainyard", mtime=0, encoder=False)

    def write(self, key: str, members: Mapping[str, bytes], *numbers: int) -> None:
        """One sample: its files by suffix, in alphabetical order (webdataset's). Its row of the index holds offset and
        length of each, and then `numbers`."""
        self._tar.write({"__key__": key, **members})
        row = []
        for _, content in sorted(members.items()):
            row += [self._end + TAR_BLOCK_BYTES, len(content)]
            self._end += TAR_BLOCK_BYTES + -(-len(content) // TAR_BLOCK_BYTES) * TAR_BLOCK_BYTES
            self.payload_bytes += len(content)
        self.rows.append((*row, *numbers))

    def finish(self) -> dict:
        """Close the shard and write its index; what a manifest says of the two files."""
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        rows = np.array(self.rows, dtype="<i8")
        np.save(self.index_path, rows, allow_pickle=False)
        index = self.index_path.read_bytes()
        return {
            "name": self.path.name,
            "size_bytes": self.path.stat().st_size,
            "sha256": self._hashing.sha256.hexdigest(),
            "index": self.index_path.name,
            "index_bytes": len(index),
            "index_sha256": hashlib.sha256(index).hexdigest(),
        }


def member_key(number: int, document_key: str) -> str:
    """Unique key of a document in its shard: its number, and what is readable of where it came from.

    Without dots (webdataset ends a key at the first one) and short enough for a plain tar header of one block.
    """
    readable = re.sub(r"[^A-Za-z0-9_-]+", "-", document_key)[-60:].strip("-")
    return f"{number:012d}-{readable}" if readable else f"{number:012d}"


@contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """A fresh folder beside `folder`, renamed to it when the block ends well and removed when it does not.

    What a killed writer left is removed, but only when it has our lock file and no living writer holds that.
    """
    aside = folder.with_name(folder.name + ".tmp")
    lock = aside / LOCK_NAME
    folder.parent.mkdir(parents=True, exist_ok=True)
    if lock.is_file():
        with open(lock, "rb") as left:
            _lock(left, aside)
            shutil.rmtree(aside)
    elif aside.is_dir() and is_empty_folder(aside):
        aside.rmdir()
    try:
        aside.mkdir()
    except FileExistsError:
        raise DataError(f"{aside} is in the way and was not made by this tool; move it elsewhere") from None
    with open(lock, "wb") as held:
        _lock(held, aside)
        try:
            yield aside
            _sync(aside)
            aside.rename(folder)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        # Only now: a kill before the rename must leave a folder that the next run may remove.
        (folder / LOCK_NAME).unlink()
        _sync(folder.parent)


def _lock(file: BinaryIO, aside: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        raise DataError(f"another process is writing {aside}; wait for it, or choose another folder") from None


def is_empty_folder(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())


def write_file(path: Path, content: bytes) -> None:
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def advice(error: OSError) -> str:
    known = {
        errno.ENOSPC: "no space left on the device; free some, or write elsewhere",
        errno.EDQUOT: "the disk quota is used up; free some, or write elsewhere",
        errno.EACCES: "permission denied; choose a folder that you may write to",
        errno.EFBIG: "the file size limit of this process is used up; raise it, or write smaller shards",
        errno.EEXIST: "a file stands where a folder is needed; choose another folder",
        errno.ENOTDIR: "a file stands where a folder is needed; choose another folder",
        errno.EROFS: "the file system is read-only; choose a folder that you may write to",
    }
    return known.get(error.errno, str(error))


def tool_version() -> str:
    try:
        return f"trainyard {importlib.metadata.version('trainyard')}"
    except importlib.metadata.PackageNotFoundError:
        return "trainyard (not installed)"
