"""Reading tar shards: memory-mapped, members found through the index, nothing is extracted."""

import mmap
import os
import tarfile
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.errors import DataError
from data_pipeline.folder.manifest import Manifest, PairsManifest, ShardFile, file_sizes, shard_faults

TAR_BLOCK_BYTES = 512
# Each mapped shard holds a file descriptor, and a process has about a thousand.
MAX_MAPPED_SHARDS = 128
MAX_FILES_NAMED = 10


class Shard:
    """One memory-mapped tar file. Raises DataError when the file is missing or of another size than the manifest's."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        self.path = path
        self.size_bytes = size_bytes
        try:
            with open(path, "rb") as file:
                found = os.fstat(file.fileno()).st_size
                if found != size_bytes:
                    raise DataError(f"{path} has {found:,} bytes where the manifest says {size_bytes:,}")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise DataError(f"cannot read shard {path}: {error.strerror or error}") from None
        except ValueError:
            raise DataError(f"shard {path} is empty") from None

    def tokens(self, offset: int, length_bytes: int, dtype: str) -> np.ndarray:
        """Read-only view of the token ids stored at `offset`. Raises DataError when the file shrank while in use."""
        self._require_whole()
        number = np.dtype(dtype)
        return np.frombuffer(self._map, number, length_bytes // number.itemsize, offset)

    def content(self, offset: int, length_bytes: int) -> bytes:
        """The bytes stored at `offset`. Raises DataError when the file shrank while in use."""
        self._require_whole()
        return self._map[offset : offset + length_bytes]

    def member_fault(self, offset: int, length_bytes: int, suffixes: tuple[str, ...]) -> str | None:
        """What is wrong with the member at `offset`; None when its tar header has that length and a suffix of those."""
        if offset < TAR_BLOCK_BYTES or offset % TAR_BLOCK_BYTES or offset + length_bytes > self.size_bytes:
            return "the index points outside the shard"
        self._require_whole()
        try:
            header = tarfile.TarInfo.frombuf(self._map[offset - TAR_BLOCK_BYTES : offset], "utf-8", "strict")
        except (tarfile.HeaderError, UnicodeDecodeError) as error:
            return f"no tar header in front of it ({error})"
        if not header.isreg() or not header.name.lower().endswith(suffixes):
            return f"member {header.name!r} is not a regular {' or '.join(suffixes)} file"
        if header.name.startswith("/") or ".." in header.name.split("/"):
            return f"member name {header.name!r} leads out of the archive"
        if header.size != length_bytes:
            return f"member {header.name!r} has {header.size:,} bytes where the index says {length_bytes:,}"
        return None

    def name(self, offset: int) -> str:
        """The member's name."""
        self._require_whole()
        return tarfile.TarInfo.frombuf(self._map[offset - TAR_BLOCK_BYTES : offset], "utf-8", "replace").name

    def key(self, offset: int) -> str:
        """The member's name without its suffix."""
        return self.name(offset).partition(".")[0]

    def _require_whole(self) -> None:
        """Touching a mapped page behind the end of its file kills the process, so ask for the size before."""
        found = self._map.size()
        if found < self.size_bytes:
            raise DataError(f"shard {self.path} shrank to {found:,} bytes while it was being read")


class MappedShards:
    """The shards of a dataset folder, mapped when they are first read. Samples are numbered through all of them.

    Args:
        folder: of the dataset.
        entries: the shards in manifest order.
        counts: the number of samples in each.
    """

    def __init__(self, folder: Path, entries: Sequence[ShardFile], counts: Sequence[int]) -> None:
        self.folder, self.entries = folder, entries
        self._first = np.cumsum([0, *counts])
        self._mapped: OrderedDict[int, Shard] = OrderedDict()

    def shard_of(self, sample: int) -> tuple[Shard, int]:
        """(the shard that holds a sample, the number of its first sample). Raises DataError as Shard does."""
        index = int(np.searchsorted(self._first, sample, side="right")) - 1
        if index not in self._mapped:
            entry = self.entries[index]
            self._mapped[index] = Shard(self.folder / entry.name, entry.size_bytes)
            if len(self._mapped) > MAX_MAPPED_SHARDS:
                self._mapped.popitem(last=False)
        self._mapped.move_to_end(index)
        return self._mapped[index], int(self._first[index])


def require_files(folder: Path, manifest: Manifest | PairsManifest) -> None:
    """Raises DataError naming shards and indexes that are missing or of another size than the manifest's."""
    sizes = file_sizes(folder)
    faults = [fault for entry in manifest.shards for fault in shard_faults(folder, entry, sizes)]
    if faults:
        more = f" and {len(faults) - MAX_FILES_NAMED} more" if len(faults) > MAX_FILES_NAMED else ""
        raise DataError("; ".join(faults[:MAX_FILES_NAMED]) + more)


def read_index(folder: Path, entry: ShardFile, num_rows: int, num_columns: int) -> np.ndarray:
    """int64 [num_rows, num_columns] of a shard's index. Raises DataError when it is unreadable or of another shape."""
    path = folder / entry.index
    try:
        rows = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"cannot read index {path}: {error}") from None
    if rows.shape != (num_rows, num_columns) or rows.dtype != np.dtype("<i8"):
        raise DataError(f"index {path} does not have {num_rows} rows of {num_columns} numbers as the manifest says")
    return rows
