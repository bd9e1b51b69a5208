"""Reading tar shards: memory-mapped, members found through the index, nothing is extracted."""

import mmap
import os
import tarfile
from pathlib import Path

import numpy as np

from common.errors import DataError
from data_pipeline.folder.manifest import ShardEntry

TAR_BLOCK_BYTES = 512
TOKENS_SUFFIX = ".tokens"
# Each mapped shard holds a file descriptor, and a process has about a thousand.
MAX_MAPPED_SHARDS = 128
MAX_FAULTS_NAMED = 10


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
        dtype = np.dtype(dtype)
        return np.frombuffer(self._map, dtype, length_bytes // dtype.itemsize, offset)

    def content(self, offset: int, length_bytes: int) -> bytes:
        """The bytes stored at `offset`. Raises DataError when the file shrank while in use."""
        self._require_whole()
        return self._map[offset : offset + length_bytes]

    def member_fault(self, offset: int, length_bytes: int, suffixes: tuple[str, ...] = (TOKENS_SUFFIX,)) -> str | None:
        """What is wrong with the tar header before `offset`: None when it is of a file as expected."""
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
        return self.name(offset).removesuffix(TOKENS_SUFFIX)

    def _require_whole(self) -> None:
        """Touching a mapped page behind the end of its file kills the process, so ask for the size before."""
        found = self._map.size()
        if found < self.size_bytes:
            raise DataError(f"shard {self.path} shrank to {found:,} bytes while it was being read")


def load_index(folder: Path, entry: ShardEntry, bytes_per_token: int) -> np.ndarray:
    """int64 [num_documents, 3]: payload offset, length in bytes, number of tokens of each member of a shard.

    Raises DataError when the index cannot be read or does not belong to the shard.
    """
    path = folder / entry.index
    try:
        rows = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"cannot read index {path}: {error}") from None
    if rows.shape != (entry.num_documents, 3) or rows.dtype != np.dtype("<i8"):
        raise DataError(f"index {path} does not have {entry.num_documents} rows of 3 numbers as the manifest says")
    fits = (rows >= 0).all() and (rows[:, 0] + rows[:, 1] <= entry.size_bytes).all()
    if not fits or (rows[:, 1] != rows[:, 2] * bytes_per_token).any() or rows[:, 2].sum() != entry.num_tokens:
        raise DataError(f"index {path} does not belong to shard {entry.name}: offsets or token counts disagree")
    return rows
