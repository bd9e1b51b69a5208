"""Writing tar shards and their indexes, into a folder that gets its name when it is complete."""

import hashlib
import importlib.metadata
import re
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from webdataset import TarWriter

from common.files import flush
from data_pipeline.folder.shard_index import BlockChecksums, index_content
from data_pipeline.folder.shard_reader import TAR_BLOCK_BYTES

DEFAULT_SHARD_BYTES = 64 * 2**20


class _HashingFile:
    """A file that takes the hash and the checksums of what is written to it on the way."""

    def __init__(self, file: BinaryIO, block_bytes: int) -> None:
        self.file = file
        self.sha256 = hashlib.sha256()
        self.checksums = BlockChecksums(block_bytes)
        self.has_failed = False

    def write(self, content: bytes) -> int:
        if self.has_failed:  # tarfile writes its end once more when it is collected, and would show a traceback
            return len(content)
        self.sha256.update(content)
        self.checksums.update(content)
        try:
            return self.file.write(content)
        except OSError:
            self.has_failed = True
            raise


class ShardWriter:
    """One tar file, written by webdataset, and the index of its members, with a checksum of every `block_bytes`."""

    def __init__(self, folder: Path, number: int, block_bytes: int) -> None:
        self.path = folder / f"shard-{number:06d}.tar"
        self.index_path = folder / f"shard-{number:06d}.index"
        self.payload_bytes = 0
        self.rows: list[tuple[int, ...]] = []
        self._end = 0
        self._file = open(self.path, "xb")  # noqa: SIM115 - closed by finish(), or with the process when it failed
        self._hashing = _HashingFile(self._file, block_bytes)
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
        self._file.close()
        flush(self.path)
        index = index_content(self.rows, self._hashing.checksums.values)
        self.index_path.write_bytes(index)
        flush(self.index_path)
        return {
            "name": self.path.name,
            "size_bytes": self.path.stat().st_size,
            "sha256": self._hashing.sha256.hexdigest(),
            "block_bytes": self._hashing.checksums.block_bytes,
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


def tool_version() -> str:
    try:
        return f"trainyard {importlib.metadata.version('trainyard')}"
    except importlib.metadata.PackageNotFoundError:
        return "trainyard (not installed)"
