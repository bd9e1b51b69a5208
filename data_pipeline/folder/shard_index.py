"""The index beside a tar shard: where its members lie, and a checksum of each block of the tar file.

The file is little-endian and has no header, because the manifest already says how long each part is and has the SHA-256
of the whole: first the int64 rows, one a sample, then the uint32 checksums, one a block.

Checksums are of blocks of the tar file and not of members: a window of a GPT is a few kilobytes out of a document of
any size, and checking it must not cost the reading of the document. Each read is widened to whole blocks, so small
blocks read little more than is asked for; large ones keep the index small. With 4 KiB for tokens, the checksums are
0.1 % of the shards, a tenth of the rows of documents of a thousand tokens; images are always read whole, and 32 KiB
make 0.01 %.

The checksum is CRC-32 (`zlib`): it finds every flipped bit and every changed run of up to 32 bits, and misses one in
2**32 of all other changes. It is no protection against somebody who means it.
"""

import hashlib
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.errors import DataError
from data_pipeline.folder.manifest import ShardFile
from data_pipeline.folder.retries import reason, with_retries

TOKEN_BLOCK_BYTES = 4096
PAIR_BLOCK_BYTES = 32768
ROW_TYPE, CHECKSUM_TYPE = np.dtype("<i8"), np.dtype("<u4")


class ShardIndex(NamedTuple):
    """What an index holds: int64 [num_samples, num_columns], and uint32 [num_blocks]."""

    rows: np.ndarray
    checksums: np.ndarray


class BlockChecksums:
    """CRC-32 of each block of a stream of bytes; the last block may be shorter."""

    def __init__(self, block_bytes: int) -> None:
        self.block_bytes = block_bytes
        self._whole: list[int] = []
        self._filled = self._current = 0

    def update(self, content: bytes) -> None:
        """Take the next bytes of the stream."""
        rest = memoryview(content)
        while rest:
            part = rest[: self.block_bytes - self._filled]
            self._current = zlib.crc32(part, self._current)
            self._filled += len(part)
            rest = rest[len(part) :]
            if self._filled == self.block_bytes:
                self._whole.append(self._current)
                self._filled = self._current = 0

    @property
    def values(self) -> list[int]:
        """The checksums of all blocks so far."""
        return [*self._whole, self._current] if self._filled else self._whole


def index_content(rows: Sequence[Sequence[int]], checksums: Sequence[int]) -> bytes:
    """The bytes of an index file."""
    return np.array(rows, dtype=ROW_TYPE).tobytes() + np.array(checksums, dtype=CHECKSUM_TYPE).tobytes()


def read_index(folder: Path, entry: ShardFile, num_rows: int, num_columns: int) -> ShardIndex:
    """The index of a shard. Raises DataError when it cannot be read or is not the one that was written."""
    path = folder / entry.index
    rows_bytes = num_rows * num_columns * ROW_TYPE.itemsize
    num_blocks = -(-entry.size_bytes // entry.block_bytes)
    if entry.index_bytes != rows_bytes + num_blocks * CHECKSUM_TYPE.itemsize:
        raise DataError(f"the manifest gives index {path} {entry.index_bytes:,} bytes, which are not {num_rows:,} rows "
                        f"of {num_columns} numbers and {num_blocks:,} checksums; the manifest was changed by hand")
    try:
        content = with_retries(f"reading index {path}", path.read_bytes)
    except OSError as error:
        raise DataError(f"cannot read index {path}: {reason(error)}") from None
    if hashlib.sha256(content).hexdigest() != entry.index_sha256:
        raise DataError(f"index {path} is damaged, or belongs to another shard: its SHA-256 differs from the manifest; "
                        "copy the dataset again or write it anew")
    rows = np.frombuffer(content, ROW_TYPE, num_rows * num_columns).reshape(num_rows, num_columns)
    return ShardIndex(rows, np.frombuffer(content, CHECKSUM_TYPE, num_blocks, rows_bytes).copy())
