"""Reading a dataset folder: shards are memory-mapped, members found through the index, nothing is extracted."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.errors import DataError
from data_pipeline.folder.manifest import Manifest, ShardEntry
from data_pipeline.folder.shard_reader import MappedShards, read_index, require_files
from data_pipeline.order import DocumentSpan, TokenSamples
from data_pipeline.text.tokenizer import Tokenizer

TOKENS_SUFFIX = ".tokens"


class TokenDataset:
    """A finished dataset folder, open for reading. Documents are numbered through all shards in manifest order.

    Pickles as its folder name: a loader process opens it again by itself.
    """

    def __init__(self, folder: Path, manifest: Manifest, rows: np.ndarray) -> None:
        self.folder = folder
        self.manifest = manifest
        self.token_counts = rows[:, 2]
        self.document_ends = np.cumsum(self.token_counts)
        self._rows = rows
        self._is_checked = np.zeros(len(rows), dtype=bool)
        self._shards = MappedShards(folder, manifest.shards, [entry.num_documents for entry in manifest.shards])

    @classmethod
    def open(cls, folder: str | os.PathLike) -> "TokenDataset":
        """Open a folder. Raises DataError naming every shard or index that is missing, short or does not belong."""
        folder = Path(folder)
        manifest = Manifest.load(folder)
        require_files(folder, manifest)
        rows = np.concatenate([load_index(folder, entry, manifest.bytes_per_token) for entry in manifest.shards])
        return cls(folder, manifest, rows)

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
        return Tokenizer.load_copy(self.folder / self.manifest.tokenizer.file)

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
        shard, _ = self._shards.shard_of(document)
        offset, length_bytes, _ = (int(value) for value in self._rows[document])
        if not self._is_checked[document]:
            fault = shard.member_fault(offset, length_bytes, (TOKENS_SUFFIX,))
            if fault:
                raise DataError(f"document {document} at byte {offset:,} of {shard.path}: {fault}")
            self._is_checked[document] = True
        return shard.tokens(offset, length_bytes, self.manifest.dtype)

    def window(self, pieces: Sequence[DocumentSpan]) -> np.ndarray:
        """int64 [num_tokens]: pieces of documents joined. Raises DataError on a token id outside the vocabulary."""
        joined = np.concatenate([self.tokens(document)[start:stop] for document, start, stop in pieces])
        if joined.max() >= self.manifest.vocab_size:
            raise DataError(self._name_bad_token(pieces))
        return joined.astype(np.int64)

    def place(self, document: int) -> tuple[str, str, int]:
        """(shard name, key, byte offset) of a document, for messages and accounting."""
        shard, _ = self._shards.shard_of(document)
        offset = int(self._rows[document, 0])
        return shard.path.name, shard.key(offset), offset

    def _name_bad_token(self, pieces: Sequence[DocumentSpan]) -> str:
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
    """int64 [num_documents, 3]: payload offset, length in bytes, number of tokens of each document of a shard.

    Raises DataError when the index cannot be read or does not belong to the shard.
    """
    rows = read_index(folder, entry, entry.num_documents, 3)
    fits = (rows >= 0).all() and (rows[:, 0] + rows[:, 1] <= entry.size_bytes).all()
    if not fits or (rows[:, 1] != rows[:, 2] * bytes_per_token).any() or rows[:, 2].sum() != entry.num_tokens:
        path = folder / entry.index
        raise DataError(f"index {path} does not belong to shard {entry.name}: offsets or token counts disagree")
    return rows
