"""The order of samples: a pure function of (seed, position). No rank, worker or micro-batch has a say in it.

In each epoch the documents are shuffled and joined into one stream of tokens; the stream is cut into windows of
`sequence_length + 1` tokens that overlap by one (the last target of a window is the first input of the next); the
windows are visited in a second shuffled order. What remains at the end of the stream, less than one window, is left out
of that epoch. The number of windows is the same in every epoch, so a position maps to (epoch, window) exactly.
"""

from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np

from common.errors import UserError
from common.seeding import derive_key

# The epoch being read and the next one: windows near the border come from both when steps run across it.
MAX_CACHED_EPOCHS = 2


class DocumentSpan(NamedTuple):
    """Tokens `start` up to `stop` (not included) of one document."""

    document: int
    start: int
    stop: int


class _Epoch(NamedTuple):
    documents: np.ndarray  # int64 [num_documents], the shuffled documents
    ends: np.ndarray  # int64 [num_documents], where each of them ends in the stream
    windows: np.ndarray  # int64 [num_windows], the shuffled windows


class WindowOrder:
    """Maps positions to the pieces of documents that make a sample.

    Args:
        token_counts: int64 [num_documents], tokens of each document, end-of-text included.
        sequence_length: tokens per sample, not counting the last target.
        seed: the run's seed; None keeps documents and windows in their stored order.

    Raises UserError when the documents together hold less than one window.
    """

    def __init__(self, token_counts: np.ndarray, sequence_length: int, seed: int | None) -> None:
        self.token_counts = np.asarray(token_counts, dtype=np.int64)
        self.sequence_length = sequence_length
        self.seed = seed
        num_tokens = int(self.token_counts.sum())
        self.windows_per_epoch = num_windows(num_tokens, sequence_length)
        if self.windows_per_epoch == 0:
            raise UserError(
                f"samples of {sequence_length + 1} tokens were asked for, but the dataset holds {num_tokens} tokens; "
                f"use a larger dataset or a shorter sequence_length"
            )
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()

    def locate(self, position: int) -> tuple[int, int]:
        """(epoch, window) of the sample at `position`, both counted from 0; the window is a place in the stream."""
        epoch, turn = divmod(position, self.windows_per_epoch)
        return epoch, int(self._epoch(epoch).windows[turn])

    def pieces(self, position: int) -> list[DocumentSpan]:
        """The pieces that, joined, are the `sequence_length + 1` tokens of the sample at `position`."""
        epoch, window = self.locate(position)
        documents, ends, _ = self._epoch(epoch)
        start = window * self.sequence_length
        stop = start + self.sequence_length + 1
        first = int(np.searchsorted(ends, start, side="right"))
        last = int(np.searchsorted(ends, stop, side="left"))
        pieces = []
        for place in range(first, last + 1):
            document = int(documents[place])
            end = int(ends[place])
            begin = end - int(self.token_counts[document])
            if end > begin:
                pieces.append(DocumentSpan(document, max(start, begin) - begin, min(stop, end) - begin))
        return pieces

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch in self._epochs:
            self._epochs.move_to_end(epoch)
            return self._epochs[epoch]
        documents = permutation(len(self.token_counts), self.seed, epoch, "documents")
        made = _Epoch(
            documents,
            np.cumsum(self.token_counts[documents]),
            permutation(self.windows_per_epoch, self.seed, epoch, "windows"),
        )
        self._epochs[epoch] = made
        while len(self._epochs) > MAX_CACHED_EPOCHS:
            self._epochs.popitem(last=False)
        return made


class TokenSamples:
    """Samples by position: windows of a dataset's tokens in a shuffled order; seed None: in their stored order.

    A sample is {"tokens": int64 [sequence_length + 1]}. Raises UserError when the dataset holds less than one.
    """

    def __init__(self, dataset: Any, sequence_length: int, seed: int | None) -> None:
        self.dataset = dataset
        self.order = WindowOrder(dataset.token_counts, sequence_length, seed)
        self.per_epoch = self.order.windows_per_epoch
        self.weights_shape: tuple[int, ...] = (sequence_length,)

    def sample(self, position: int) -> dict:
        return {"tokens": self.dataset.window(self.order.pieces(position))}


def num_windows(num_tokens: int, sequence_length: int) -> int:
    """How many windows of `sequence_length + 1` tokens, overlapping by one, a stream of `num_tokens` gives."""
    return max(0, num_tokens - 1) // sequence_length


def permutation(size: int, seed: int | None, epoch: int, purpose: str) -> np.ndarray:
    """int64 [size]: a shuffle of range(size) that depends on (seed, epoch, purpose) only; in order when seed is None.

    The raw output of a bit generator is sorted instead of calling `Generator.permutation`: NumPy keeps raw streams
    stable across versions and machines but not its Generator methods, and a run must resume after an upgrade.
    """
    if seed is None:
        return np.arange(size, dtype=np.int64)
    bits = np.random.Philox(key=derive_key(seed, epoch, purpose))
    return np.argsort(bits.random_raw(size), kind="stable")
