"""Turning a window of tokens into a source and a target: span corruption, prefix LM, fill-in-the-middle.

Shapes: n tokens of the window, s of the source, t of the target. Every stage takes a sample with `position` and
`tokens` (int64 [n + 1]; the last token is the next one, which most leave out) and gives the fields of a batch.
"""

from dataclasses import dataclass

import numpy as np

from data_pipeline.corruption.noise_seed import NoiseSeed
from data_pipeline.corruption.random_stream import Noise
from data_pipeline.corruption.special_ids import SpanCounts, SpecialIds


def span_mask(noise: Noise, counts: SpanCounts) -> np.ndarray:
    """bool [n], True where hidden: kept and hidden spans in turn, a kept one first (as in T5's published code)."""
    hidden = noise.segments(counts.num_noise, counts.num_spans)
    kept = noise.segments(counts.num_raw - counts.num_noise, counts.num_spans)
    lengths = np.stack([kept, hidden], axis=1).reshape(-1)
    return np.repeat(np.arange(lengths.size) % 2 == 1, lengths)


def spans_to_sentinels(tokens: np.ndarray, hidden: np.ndarray, first_sentinel: int) -> np.ndarray:
    """`tokens` with every run of hidden ones replaced by one sentinel, counted down from `first_sentinel`."""
    begins = hidden & ~np.concatenate([[False], hidden[:-1]])
    with_sentinels = np.where(begins, first_sentinel + 1 - np.cumsum(begins), tokens)
    return with_sentinels[begins | ~hidden]


def shifted(start: int, tokens: np.ndarray, length: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Decoder tokens int64 [length + 1], of which a target is the next of each, and weights float32 [length]."""
    row = np.full(length + 1, pad, dtype=np.int64)
    row[0] = start
    row[1 : tokens.size + 1] = tokens
    return row, (np.arange(length) < tokens.size).astype(np.float32)


def filled(tokens: np.ndarray, length: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """`tokens` filled up to int64 [length], and int64 [length] that is 1 where they are."""
    row = np.full(length, pad, dtype=np.int64)
    row[: tokens.size] = tokens
    return row, (np.arange(length) < tokens.size).astype(np.int64)


@dataclass(frozen=True)
class SpanCorruption:
    """Source: kept tokens with a sentinel for each span, exactly s; target: each sentinel with what it hides."""

    seed: NoiseSeed
    counts: SpanCounts
    target_length: int
    special: SpecialIds
    end_of_text: int

    def __call__(self, sample: dict) -> dict:
        """Fields `source` [s], `tokens` [t + 1], `weights` [t]."""
        tokens = sample["tokens"][: self.counts.num_raw]
        hidden = span_mask(Noise(self.seed, sample["position"], "spans"), self.counts)
        end = [self.end_of_text]
        source = np.concatenate([spans_to_sentinels(tokens, hidden, self.special.first_sentinel), end])
        target = np.concatenate([spans_to_sentinels(tokens, ~hidden, self.special.first_sentinel), end])
        row, weights = shifted(self.special.pad, target, self.target_length, self.special.pad)
        return {"position": sample["position"], "source": source, "tokens": row, "weights": weights}


@dataclass(frozen=True)
class PrefixCut:
    """For a decoder: the first tokens are seen in both directions and are no targets."""

    seed: NoiseSeed

    def __call__(self, sample: dict) -> dict:
        """Fields `tokens` [n + 1], `prefix` int64 [] in 1 .. n - 1, `weights` [n]."""
        length = sample["tokens"].size - 1
        prefix = 1 + Noise(self.seed, sample["position"], "prefix").below(length - 1, 1)[0]
        # The prefix's last token predicts the first one after it.
        weights = (np.arange(length) >= prefix - 1).astype(np.float32)
        return {**sample, "prefix": np.asarray(prefix), "weights": weights}


@dataclass(frozen=True)
class PrefixSplit:
    """For an encoder-decoder: the first tokens are the source, the others the target."""

    seed: NoiseSeed
    num_raw: int
    source_length: int
    target_length: int
    special: SpecialIds

    def __call__(self, sample: dict) -> dict:
        """Fields `source` and `source_mask` [s], `tokens` [t + 1], `weights` [t]."""
        tokens = sample["tokens"][: self.num_raw]
        prefix = 1 + int(Noise(self.seed, sample["position"], "prefix").below(self.num_raw - 1, 1)[0])
        source, mask = filled(tokens[:prefix], self.source_length, self.special.pad)
        row, weights = shifted(self.special.pad, tokens[prefix:], self.target_length, self.special.pad)
        return {"position": sample["position"], "source": source, "source_mask": mask, "tokens": row,
                "weights": weights}


@dataclass(frozen=True)
class FillInTheMiddle:
    """Moves the middle of documents to their end (Bavarian et al. 2022, section 3 and appendix D).

    Works inside the window: a part of a document in it counts as one.
    Sentinels 0, 1, 2 stand before prefix, suffix and middle. In the order of the paper's joint SPM form, prefix and
    middle follow each other: <pre> <suf> suffix <mid> prefix middle. What no longer fits is cut from the end.
    """

    seed: NoiseSeed
    rate: float
    spm_rate: float
    special: SpecialIds
    end_of_text: int

    def __call__(self, sample: dict) -> dict:
        """Field `tokens` [n + 1]."""
        tokens, noise = sample["tokens"], Noise(self.seed, sample["position"], "middle")
        documents = np.split(tokens, np.flatnonzero(tokens == self.end_of_text) + 1)
        chances = noise.uniform(4 * len(documents)).reshape(-1, 4)
        parts = [self._rearranged(document, row) for document, row in zip(documents, chances, strict=True)]
        return {**sample, "tokens": np.concatenate(parts)[: tokens.size]}

    def _rearranged(self, document: np.ndarray, chances: np.ndarray) -> np.ndarray:
        ends = document.size > 0 and document[-1] == self.end_of_text
        text = document[:-1] if ends else document
        if text.size < 3 or chances[0] >= self.rate:
            return document
        first, second = np.sort((chances[2:] * (text.size + 1)).astype(np.int64))
        prefix, middle, suffix = text[:first], text[first:second], text[second:]
        pre, suf, mid = ([self.special.first_sentinel - number] for number in range(3))
        if chances[1] < self.spm_rate:
            parts = [pre, suf, suffix, mid, prefix, middle]
        else:
            parts = [pre, prefix, suf, suffix, mid, middle]
        return np.concatenate([*parts, document[text.size :]]).astype(np.int64)
