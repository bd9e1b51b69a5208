"""BART's denoising: five kinds of corruption and the stage that applies them (Lewis et al. 2020, section 2.2).

Functions work on arrays of token ids, int64 [n].
"""

from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple

import numpy as np

from data_pipeline.corruption.random_stream import RandomStream
from data_pipeline.corruption.span_corruption import SourceTarget


class Spans(NamedTuple):
    """Spans to mask: span i starts at `starts[i]` and has `lengths[i]` tokens, maybe 0. Both int64 [num_spans]."""

    starts: np.ndarray
    lengths: np.ndarray


def draw_spans(random: RandomStream, num_tokens: int, num_masked: int, mean_span: float) -> Spans:
    """Poisson spans of `num_masked` of `num_tokens` tokens in all, in order, with a kept token between any two."""
    if num_masked == 0:
        return Spans(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))
    lengths = np.zeros(0, dtype=np.int64)
    while lengths.sum() < num_masked:
        lengths = np.concatenate([lengths, random.poisson(mean_span, 2 * num_masked + 8)])
    count = int(np.searchsorted(np.cumsum(lengths), num_masked)) + 1
    lengths = lengths[:count]
    lengths[-1] -= lengths.sum() - num_masked
    num_kept = num_tokens - num_masked
    if count > min(num_kept + 1, num_masked):  # very few tokens: no room for empty spans
        lengths = lengths[lengths > 0]
    if lengths.size > num_kept + 1:  # more spans than places between kept tokens: join the last ones
        lengths = np.append(lengths[:num_kept], lengths[num_kept:].sum())
    places = np.flatnonzero(random.chosen(num_kept + 1, lengths.size))
    return Spans(places + np.cumsum(lengths) - lengths, lengths)


def infill(tokens: np.ndarray, spans: Spans, mask_id: int) -> np.ndarray:
    """`tokens` with one mask in place of each span; an empty span inserts a mask between two tokens."""
    depth = np.zeros(tokens.size + 1, dtype=np.int64)
    full = spans.lengths > 0
    np.add.at(depth, spans.starts[full], 1)
    np.add.at(depth, spans.starts[full] + spans.lengths[full], -1)
    kept = np.cumsum(depth[:-1]) == 0
    before = np.concatenate([[0], np.cumsum(kept)])  # kept tokens before each place
    return np.insert(tokens[kept], before[spans.starts], mask_id)


def permute_sentences(random: RandomStream, tokens: np.ndarray, is_end: np.ndarray) -> np.ndarray:
    """`tokens` with sentences shuffled; `is_end` bool [vocabulary] is True for tokens that end one."""
    ends = np.flatnonzero(is_end[tokens[:-1]]) + 1
    sentence = np.zeros(tokens.size, dtype=np.int64)
    sentence[ends] = 1
    turn = random.permutation(ends.size + 1)
    return tokens[np.argsort(turn[np.cumsum(sentence)], kind="stable")]


@dataclass(frozen=True)
class Denoising(SourceTarget):
    """The source is the corrupted sample between start and end-of-text, the target the original sample.

    Both lengths are at least `num_raw` + 2.

    Args:
        end_of_text: ends source and target; also the first decoder input.
        is_end: bool [vocabulary], True for tokens that end a sentence; None leaves sentences in order.
        infill_ratio: fraction of the tokens in spans that become one mask each.
        mean_span: mean of the Poisson distribution of span lengths, in tokens.
        mask_ratio: fraction of the tokens that become a mask each.
        delete_ratio: fraction of the tokens that are deleted.
        rotate_rate: fraction of the samples that are rotated to begin at a random token.
    """

    _: KW_ONLY
    end_of_text: int
    is_end: np.ndarray | None
    infill_ratio: float
    mean_span: float
    mask_ratio: float
    delete_ratio: float
    rotate_rate: float

    def __call__(self, sample: dict) -> dict:
        """Fields `source` and `source_mask` [s], `tokens` [t + 1], `weights` [t]."""
        tokens = sample["tokens"][: self.num_raw]
        start, end = [self.special.required("start")], [self.end_of_text]
        corrupted = self.corrupted(tokens, sample["position"])
        return self.fields(sample["position"], np.concatenate([start, corrupted, end]),
                           np.concatenate([start, tokens, end]), decoder_start=self.end_of_text)

    def corrupted(self, tokens: np.ndarray, position: int) -> np.ndarray:
        """The corrupted tokens of the sample at `position`, at most as many as `tokens`."""

        def random(purpose: str) -> RandomStream:
            return RandomStream(self.seed, position, purpose)

        if self.is_end is not None:
            tokens = permute_sentences(random("sentences"), tokens, self.is_end)
        num_masked = round(tokens.size * self.infill_ratio)
        if num_masked:
            spans = draw_spans(random("infill"), tokens.size, num_masked, self.mean_span)
            tokens = infill(tokens, spans, self.special.required("mask"))
        if self.mask_ratio:
            chosen = random("mask").chosen(tokens.size, round(tokens.size * self.mask_ratio))
            tokens = np.where(chosen, self.special.required("mask"), tokens)
        if self.delete_ratio:
            tokens = tokens[~random("delete").chosen(tokens.size, round(tokens.size * self.delete_ratio))]
        if self.rotate_rate:
            chance = random("rotate").uniform(2)
            if chance[0] < self.rotate_rate:
                tokens = np.roll(tokens, -int(chance[1] * tokens.size))
        return tokens
