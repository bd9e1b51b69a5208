"""Documents tokenized in memory, with the interface of a dataset folder."""

from collections.abc import Iterable, Sequence

import numpy as np

from common.errors import UserError
from data_pipeline.order import DocumentSpan, TokenSamples
from data_pipeline.text.tokenizer import TextTokenizer


class TextDataset:
    """Documents in their order, each ended by the tokenizer's end-of-text. Raises DataError when there is none."""

    def __init__(self, texts: Iterable[str], tokenizer: TextTokenizer) -> None:
        self.tokenizer, self.vocab_size, self.end_of_text = tokenizer, tokenizer.vocab_size, tokenizer.end_of_text
        self._tokens: list[np.ndarray] = []
        self._text_bytes: list[int] = []
        for text in texts:
            self._tokens.append(np.array([*tokenizer.encode(text), tokenizer.end_of_text], dtype=np.int64))
            self._text_bytes.append(len(text.encode("utf-8")))
        if not self._tokens:
            raise UserError("there is no text in the input")
        self.token_counts = np.array([len(tokens) for tokens in self._tokens])
        self.document_ends = np.cumsum(self.token_counts)

    def __len__(self) -> int:
        """Number of documents."""
        return len(self._tokens)

    def text_bytes(self, num_documents: int) -> int:
        """UTF-8 bytes of the text of the first documents."""
        return sum(self._text_bytes[:num_documents])

    def samples(self, sequence_length: int, seed: int | None) -> TokenSamples:
        """The samples by position."""
        return TokenSamples(self, sequence_length, seed)

    def tokens(self, document: int) -> np.ndarray:
        """int64 [num_tokens] of one document."""
        return self._tokens[document]

    def window(self, pieces: Sequence[DocumentSpan]) -> np.ndarray:
        """int64 [num_tokens]: pieces of documents joined."""
        return np.concatenate([self._tokens[document][start:stop] for document, start, stop in pieces])
