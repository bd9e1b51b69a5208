"""Reading a dataset folder: shards are memory-mapped, members found through the index, nothing is extracted."""

import mmap
import os
import tarfile
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.manifest import Manifest, ShardEntry, file_sizes, shard_faults
from data_pipeline.order import Piece, TokenSamples
from data_pipeline.tokenizer import Tokenizer

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


class TokenDataset:
    """A finished dataset folder, open for reading. Documents are numbered through all shards in manifest order.

    Pickles as its folder name: a loader process opens it again by itself.
    """

    def __init__(self, folder: Path, manifest: Manifest, rows: np.ndarray, first_documents: np.ndarray) -> None:
        self.folder = folder
        self.manifest = manifest
        self.token_counts = rows[:, 2]
        self._rows = rows
        self._first_documents = first_documents
        self._is_checked = np.zeros(len(rows), dtype=bool)
        self._mapped: OrderedDict[int, Shard] = OrderedDict()

    @classmethod
    def open(cls, folder: str | os.PathLike) -> "TokenDataset":
        """Open a folder. Raises DataError naming every shard or index that is missing, short or does not belong."""
        folder = Path(folder)
        manifest = Manifest.load(folder)
        sizes = file_sizes(folder)
        faults = [fault for entry in manifest.shards for fault in shard_faults(folder, entry, sizes)]
        if faults:
            more = f" and {len(faults) - MAX_FAULTS_NAMED} more" if len(faults) > MAX_FAULTS_NAMED else ""
            raise DataError("; ".join(faults[:MAX_FAULTS_NAMED]) + more)
        rows = np.concatenate([load_index(folder, entry, manifest.bytes_per_token) for entry in manifest.shards])
        counts = [entry.num_documents for entry in manifest.shards]
        return cls(folder, manifest, rows, np.cumsum([0, *counts]))

    def __reduce__(self) -> tuple:
        return TokenDataset.open, (str(self.folder),)

    def __len__(self) -> int:
        """Number of documents."""
        return len(self._rows)

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents, end-of-text included."""
        return self.manifest.num_tokens

    @property
    def vocab_size(self) -> int:
        """Number of ids that the tokenizer gives out."""
        return self.manifest.vocab_size

    @property
    def end_of_text(self) -> int:
        """The id that ends every document."""
        return self.manifest.end_of_text

    @property
    def tokenizer(self) -> Tokenizer:
        """The copy of the tokenizer in the folder. Raises DataError when it cannot be read."""
        return Tokenizer.load(self.folder / self.manifest.tokenizer.file)

    def text_bytes(self, num_documents: int) -> int:
        """UTF-8 bytes of the text of the first documents."""
        if num_documents == len(self):
            return self.manifest.text_bytes
        tokenizer = self.tokenizer
        return sum(len(tokenizer.decode(self.tokens(number)).encode()) for number in range(num_documents))

    def samples(self, sequence_length: int, seed: int | None) -> TokenSamples:
        """The samples by position."""
        return TokenSamples(self, sequence_length, seed)

    def tokens(self, document: int) -> np.ndarray:
        """uint16 or uint32 [num_tokens]: a read-only view of one document's token ids.

        Raises DataError naming shard and document when the tar member is not what the index says.
        """
        shard, entry = self._shard_of(document)
        offset, length_bytes, _ = (int(value) for value in self._rows[document])
        if not self._is_checked[document]:
            fault = shard.member_fault(offset, length_bytes)
            if fault:
                raise DataError(f"document {document} at byte {offset:,} of {shard.path}: {fault}")
            self._is_checked[document] = True
        return shard.tokens(offset, length_bytes, self.manifest.dtype)

    def window(self, pieces: Sequence[Piece]) -> np.ndarray:
        """int64 [num_tokens]: pieces of documents joined. Raises DataError on a token id outside the vocabulary."""
        joined = np.concatenate([self.tokens(document)[start:stop] for document, start, stop in pieces])
        if joined.max() >= self.manifest.vocab_size:
            raise DataError(self._name_bad_token(pieces))
        return joined.astype(np.int64)

    def place(self, document: int) -> tuple[str, str, int]:
        """(shard name, key, byte offset) of a document, for messages and accounting."""
        shard, entry = self._shard_of(document)
        offset = int(self._rows[document, 0])
        return entry.name, shard.key(offset), offset

    def _shard_of(self, document: int) -> tuple[Shard, ShardEntry]:
        number = int(np.searchsorted(self._first_documents, document, side="right")) - 1
        entry = self.manifest.shards[number]
        if number not in self._mapped:
            self._mapped[number] = Shard(self.folder / entry.name, entry.size_bytes)
            if len(self._mapped) > MAX_MAPPED_SHARDS:
                self._mapped.popitem(last=False)
        self._mapped.move_to_end(number)
        return self._mapped[number], entry

    def _name_bad_token(self, pieces: Sequence[Piece]) -> str:
        for document in (piece.document for piece in pieces):
            largest = int(self.tokens(document).max())
            if largest >= self.manifest.vocab_size:
                name, key, offset = self.place(document)
                return (
                    f"document {document} ({key}) at byte {offset:,} of {self.folder / name} holds token id {largest}, "
                    f"but the vocabulary ends at {self.manifest.vocab_size - 1}: the shard is damaged"
                )
        raise AssertionError("no piece holds a token id outside the vocabulary")


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
