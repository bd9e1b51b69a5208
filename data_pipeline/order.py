"""The order of samples: a pure function of (seed, position). No rank, worker or micro-batch has a say in it.

The documents in their stored order are one stream of tokens, which closes to a ring. In each epoch the ring is cut,
from another token on, into windows of `sequence_length + 1` tokens that overlap by one (the last target of a window is
the first input of the next), and the windows are visited in a shuffled order. What remains of the ring, less than one
window, is left out of that epoch. The number of windows is the same in every epoch, so a position maps to (epoch,
window) exactly, and any position costs the same: nothing is sorted, and no array of the size of an epoch is made.
"""

from typing import Any, NamedTuple

import numpy as np

from common.errors import UserError
from common.seeding import derive
from data_pipeline.keyed_permutation import BlockShuffle

# 2 MB of a shard where an id has two bytes. Sets of less than 134 million tokens (128 blocks) are shuffled as a whole.
BLOCK_TOKENS = 2**20


class DocumentSpan(NamedTuple):
    """Tokens `start` up to `stop` (not included) of one document."""

    document: int
    start: int
    stop: int


class WindowOrder:
    """Maps positions to the pieces of documents that make a sample.

    Args:
        document_ends: int64 [num_documents], where each document ends in the stored stream, end-of-text included. May
            be mapped from a file: a look-up touches few of its pages.
        sequence_length: tokens per sample, not counting the last target.
        seed: the run's seed; None keeps the windows in their stored order.

    Raises UserError when the documents together hold less than one window.
    """

    def __init__(self, document_ends: np.ndarray, sequence_length: int, seed: int | None) -> None:
        self.document_ends = document_ends
        self.sequence_length = sequence_length
        self.seed = seed
        self.num_tokens = int(document_ends[-1]) if len(document_ends) else 0
        self.windows_per_epoch = num_windows(self.num_tokens, sequence_length)
        if self.windows_per_epoch == 0:
            raise UserError(
                f"samples of {sequence_length + 1} tokens were asked for, but the dataset holds {self.num_tokens} "
                f"tokens; use a larger dataset or a shorter sequence_length"
            )
        self._shuffle = BlockShuffle(self.windows_per_epoch, block=max(1, BLOCK_TOKENS // sequence_length),
                                     seed=seed, purpose="windows")

    def locate(self, position: int) -> tuple[int, int]:
        """(epoch, window) of the sample at `position`, both counted from 0; the window is a place in the stream."""
        return self._shuffle.locate(position)

    def first_token(self, epoch: int) -> int:
        """Where the first window of an epoch begins in the stored stream, below `sequence_length`."""
        return 0 if self.seed is None else derive(self.seed, epoch, "cut") % self.sequence_length

    def pieces(self, position: int) -> list[DocumentSpan]:
        """The pieces that, joined, are the `sequence_length + 1` tokens of the sample at `position`."""
        epoch, window = self.locate(position)
        start = self.first_token(epoch) + window * self.sequence_length
        stop = start + self.sequence_length + 1
        behind = stop - self.num_tokens  # tokens of a window that closes the ring
        if behind <= 0:
            return self._spans(start, stop)
        return self._spans(start, self.num_tokens) + self._spans(0, behind)

    def _spans(self, start: int, stop: int) -> list[DocumentSpan]:
        """The spans of the tokens `start` up to `stop` of the stored stream."""
        ends = self.document_ends
        first = int(np.searchsorted(ends, start, side="right"))
        last = int(np.searchsorted(ends, stop, side="left"))
        begin = int(ends[first - 1]) if first else 0
        spans = []
        for document, end in enumerate(ends[first : last + 1].tolist(), first):
            if end > begin and start < stop:
                spans.append(DocumentSpan(document, max(start, begin) - begin, min(stop, end) - begin))
            begin = end
        return spans


class TokenSamples:
    """Samples by position: windows of a dataset's tokens in a shuffled order; seed None: in their stored order.

    A sample is {"tokens": int64 [sequence_length + 1]}. Raises UserError when the dataset holds less than one.
    """

    def __init__(self, dataset: Any, sequence_length: int, seed: int | None) -> None:
        self.dataset = dataset
        self.order = WindowOrder(dataset.document_ends, sequence_length, seed)
        self.per_epoch = self.order.windows_per_epoch
        self.weights_shape: tuple[int, ...] = (sequence_length,)

    def sample(self, position: int) -> dict:
        return {"tokens": self.dataset.window(self.order.pieces(position))}


def num_windows(num_tokens: int, sequence_length: int) -> int:
    """How many windows of `sequence_length + 1` tokens, overlapping by one, a stream of `num_tokens` gives."""
    return max(0, num_tokens - 1) // sequence_length
