"""Reading tar shards: members are found through the index, nothing is extracted, every byte is checked.

Each read goes through `pread` into memory of our own and is compared with the checksums of its blocks every time, not
only the first time: a size or a time of change proves nothing about a file that is overwritten in place. Pages of a
file are never mapped: a mapped page that cannot be read ends the process with SIGBUS, where `pread` gives an error.

What each change of a file under an open shard does: overwritten in place, zeroed, a flipped bit: the checksum differs.
Cut: the read is short. Removed, or replaced by a rename: the file that is open stays as it was and is read on; where
it has to be opened again, it is missing, has another size, or its checksums differ.
"""

import os
import tarfile
import weakref
import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np

from common.errors import DataError
from data_pipeline.folder.manifest import Manifest, PairsManifest, ShardFile, file_sizes, shard_faults
from data_pipeline.folder.retries import reason, with_retries

TAR_BLOCK_BYTES = 512
# Each open shard holds a file descriptor, and a process has about a thousand.
MAX_OPEN_SHARDS = 128
MAX_FILES_NAMED = 10
CLOSED = -1


class DamagedBytes(DataError):
    """Bytes of a shard that are not those that were written; the message names the shard and the place."""


class Shard:
    """One tar file, open for reading.

    Args:
        folder: of the dataset.
        entry: the shard's entry in the manifest.
        checksums: uint32 [num_blocks], CRC-32 of each block of `entry.block_bytes` of the file.

    Raises DataError when the file cannot be opened or has another size than the manifest's.
    """

    def __init__(self, folder: Path, entry: ShardFile, checksums: np.ndarray) -> None:
        self.path = folder / entry.name
        self.size_bytes, self.block_bytes = entry.size_bytes, entry.block_bytes
        self._checksums = checksums
        self._file = CLOSED
        try:
            with_retries(f"opening shard {self.path}", self._open)
        except OSError as error:
            raise DataError(f"cannot read shard {self.path}: {reason(error)}") from None

    def close(self) -> None:
        """Give the file descriptor back, as happens by itself when nobody holds the shard; `read` opens it again."""
        self._finalizer()
        self._file = CLOSED

    def read(self, offset: int, length_bytes: int) -> memoryview:
        """The bytes stored at `offset`, read-only, as they were written.

        Raises DamagedBytes when they are not, and DataError when the file shrank or cannot be read.
        """
        if offset < 0 or offset + length_bytes > self.size_bytes:
            raise DamagedBytes(f"the index points outside of {self.path}")
        first = offset // self.block_bytes
        start = first * self.block_bytes
        stop = min(-(-(offset + length_bytes) // self.block_bytes) * self.block_bytes, self.size_bytes)
        content = memoryview(self._bytes(start, stop - start))
        for number, begin in enumerate(range(0, stop - start, self.block_bytes), first):
            block = content[begin : begin + self.block_bytes]
            if zlib.crc32(block) != self._checksums[number]:
                place = number * self.block_bytes
                raise DamagedBytes(f"bytes {place:,} to {place + len(block) - 1:,} of {self.path} do not match their "
                                   "checksum: the file was damaged or overwritten after it was written")
        return content[offset - start : offset - start + length_bytes]

    def member(self, offset: int, length_bytes: int, suffixes: tuple[str, ...]) -> tuple[str, memoryview]:
        """(name, content) of the member whose content is at `offset`.

        Raises as `read`, and DamagedBytes when no tar header of that length and a suffix of those is in front of it.
        """
        if offset < TAR_BLOCK_BYTES or offset % TAR_BLOCK_BYTES:
            raise DamagedBytes(f"the index points outside of the members of {self.path}")
        content = self.read(offset - TAR_BLOCK_BYTES, TAR_BLOCK_BYTES + length_bytes)
        header = _header(content, f"{self.path} at byte {offset - TAR_BLOCK_BYTES:,}")
        if not header.isreg() or not header.name.lower().endswith(suffixes):
            raise DamagedBytes(f"member {header.name!r} of {self.path} is not a regular {' or '.join(suffixes)} file")
        if header.name.startswith("/") or ".." in header.name.split("/"):
            raise DamagedBytes(f"member name {header.name!r} leads out of {self.path}")
        if header.size != length_bytes:
            raise DamagedBytes(f"member {header.name!r} of {self.path} has {header.size:,} bytes where the index says "
                               f"{length_bytes:,}")
        return header.name, content[TAR_BLOCK_BYTES:]

    def name(self, offset: int) -> str:
        """The name of the member at `offset`. Raises as `read`, and DamagedBytes when there is no header."""
        start = offset - TAR_BLOCK_BYTES
        return _header(self.read(start, TAR_BLOCK_BYTES), f"{self.path} at byte {start:,}").name

    def key(self, offset: int) -> str:
        """The member's name without its suffix. Raises as `name`."""
        return self.name(offset).partition(".")[0]

    def _open(self) -> None:
        self._file = os.open(self.path, os.O_RDONLY)
        self._finalizer = weakref.finalize(self, os.close, self._file)
        found = os.fstat(self._file).st_size
        if found != self.size_bytes:
            raise DataError(f"{self.path} has {found:,} bytes where the manifest says {self.size_bytes:,}")

    def _bytes(self, offset: int, length_bytes: int) -> bytes:
        try:
            content = with_retries(f"reading shard {self.path} at byte {offset:,}",
                                   lambda: self._pread(offset, length_bytes))
        except OSError as error:
            raise DataError(f"cannot read shard {self.path} at byte {offset:,}: {reason(error)}") from None
        if len(content) < length_bytes:
            end = offset + len(content)
            raise DataError(f"shard {self.path} shrank while it was being read: it has no byte {end:,}")
        return content

    def _pread(self, offset: int, length_bytes: int) -> bytes:
        """Fewer bytes at the end of the file only."""
        if self._file == CLOSED:
            self._open()
        try:
            content = os.pread(self._file, length_bytes, offset)
            while len(content) < length_bytes and (
                more := os.pread(self._file, length_bytes - len(content), offset + len(content))
            ):
                content += more
        except OSError:
            self.close()  # the next attempt opens it anew, because the handle may be stale
            raise
        return content


class OpenShards:
    """The shards of a dataset folder, opened when they are first read. Samples are numbered through all of them.

    Args:
        folder: of the dataset.
        entries: the shards in manifest order.
        counts: the number of samples in each.
        checksums: those of the blocks of each.
    """

    def __init__(self, folder: Path, entries: Sequence[ShardFile], counts: Sequence[int],
                 checksums: Sequence[np.ndarray]) -> None:
        self.folder, self.entries, self.checksums = folder, entries, checksums
        self._first = list(accumulate(counts, initial=0))
        self._open: OrderedDict[int, Shard] = OrderedDict()

    def shard_of(self, sample: int) -> tuple[Shard, int]:
        """(the shard that holds a sample, the number of its first sample). Raises DataError as Shard does."""
        index = bisect_right(self._first, sample) - 1
        shard = self._open.get(index)
        if shard is None:
            shard = self._open[index] = Shard(self.folder, self.entries[index], self.checksums[index])
            if len(self._open) > MAX_OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(index)
        return shard, self._first[index]


def require_files(folder: Path, manifest: Manifest | PairsManifest) -> None:
    """Raises DataError naming shards and indexes that are missing or of another size than the manifest's."""
    sizes = file_sizes(folder)
    faults = [fault for entry in manifest.shards for fault in shard_faults(folder, entry, sizes)]
    if faults:
        more = f" and {len(faults) - MAX_FILES_NAMED} more" if len(faults) > MAX_FILES_NAMED else ""
        raise DataError("; ".join(faults[:MAX_FILES_NAMED]) + more)


def _header(content: memoryview, place: str) -> tarfile.TarInfo:
    try:
        return tarfile.TarInfo.frombuf(bytes(content[:TAR_BLOCK_BYTES]), "utf-8", "strict")
    except (tarfile.HeaderError, UnicodeDecodeError) as error:
        raise DamagedBytes(f"no tar header in {place} ({error})") from None
