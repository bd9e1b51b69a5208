"""Reading a dataset folder of tokenized documents: found through the index, every byte checked against its checksum."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.errors import DataError
from data_pipeline.folder.manifest import Manifest, ShardEntry
from data_pipeline.folder.shard_index import ShardIndex, read_index
from data_pipeline.folder.shard_reader import OpenShards, require_files
from data_pipeline.order import DocumentSpan, TokenSamples
from data_pipeline.text.tokenizer import Tokenizer

TOKENS_SUFFIX = ".tokens"


class TokenDataset:
    """A finished dataset folder, open for reading. Documents are numbered through all shards in manifest order.

    Pickles as its folder name: a loader process opens it again by itself.
    """

    def __init__(self, folder: Path, manifest: Manifest, indexes: Sequence[ShardIndex]) -> None:
        self.folder = folder
        self.manifest = manifest
        self._rows = np.concatenate([index.rows for index in indexes])
        self.token_counts = self._rows[:, 2]
        self.document_ends = np.cumsum(self.token_counts)
        self._dtype = np.dtype(manifest.dtype)
        self._shards = OpenShards(folder, manifest.shards, [entry.num_documents for entry in manifest.shards],
                                  [index.checksums for index in indexes])

    @classmethod
    def open(cls, folder: str | os.PathLike) -> "TokenDataset":
        """Open a folder. Raises DataError naming every shard or index that is missing, short or does not belong."""
        folder = Path(folder)
        manifest = Manifest.load(folder)
        require_files(folder, manifest)
        return cls(folder, manifest, [load_index(folder, entry, manifest.bytes_per_token) for entry in manifest.shards])

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
        """The copy of the tokenizer in the folder. Raises DataError when it is not the one that was written."""
        return Tokenizer.load_copy(self.folder / self.manifest.tokenizer.file, self.manifest.tokenizer.sha256)

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
        """uint16 or uint32 [num_tokens]: one document's token ids, read-only.

        Raises DataError naming shard and document when they are not those that were written, or cannot be read.
        """
        return self._piece(DocumentSpan(document, 0, int(self.token_counts[document])))

    def window(self, pieces: Sequence[DocumentSpan]) -> np.ndarray:
        """int64 [num_tokens]: pieces of documents joined. Raises DataError as `tokens`, or on an id outside the
        vocabulary."""
        joined = np.concatenate([self._piece(piece) for piece in pieces])
        if joined.max() >= self.manifest.vocab_size:
            raise DataError(self._name_bad_token(pieces))
        return joined.astype(np.int64)

    def _piece(self, piece: DocumentSpan) -> np.ndarray:
        document, start, stop = piece
        size = self._dtype.itemsize
        offset = int(self._rows[document, 0])
        try:
            shard, _ = self._shards.shard_of(document)
            content = shard.read(offset + start * size, (stop - start) * size)
        except DataError as error:
            raise DataError(f"document {document} at byte {offset:,}: {error}") from None
        return np.frombuffer(content, self._dtype)

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


def load_index(folder: Path, entry: ShardEntry, bytes_per_token: int) -> ShardIndex:
    """The index of a shard; rows are int64 [num_documents, 3]: payload offset, length in bytes, number of tokens.

    Raises DataError when the index cannot be read or does not belong to the shard.
    """
    index = read_index(folder, entry, entry.num_documents, 3)
    rows = index.rows
    fits = (rows >= 0).all() and (rows[:, 0] + rows[:, 1] <= entry.size_bytes).all()
    if not fits or (rows[:, 1] != rows[:, 2] * bytes_per_token).any() or rows[:, 2].sum() != entry.num_tokens:
        path = folder / entry.index
        raise DataError(f"index {path} does not belong to shard {entry.name}: offsets or token counts disagree")
    return index
