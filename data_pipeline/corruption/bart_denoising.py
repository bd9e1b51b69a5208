"""The kinds of damage that BART learns to repair (Lewis et al. 2020, section 2.2), on arrays of token ids."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data_pipeline.corruption.noise_seed import NoiseSeed
from data_pipeline.corruption.random_stream import Noise
from data_pipeline.corruption.span_corruption import filled, shifted
from data_pipeline.corruption.special_ids import SpecialIds


class Gaps(NamedTuple):
    """Spans to hide: span i begins after `starts[i]` tokens and takes `lengths[i]` of them, maybe none."""

    starts: np.ndarray
    lengths: np.ndarray


def draw_gaps(noise: Noise, num_tokens: int, num_hidden: int, mean_span: float) -> Gaps:
    """Poisson spans of `num_hidden` tokens in all, in order, with at least one kept token between any two."""
    if num_hidden == 0:
        return Gaps(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))
    lengths = np.zeros(0, dtype=np.int64)
    while lengths.sum() < num_hidden:
        lengths = np.concatenate([lengths, noise.poisson(mean_span, 2 * num_hidden + 8)])
    count = int(np.searchsorted(np.cumsum(lengths), num_hidden)) + 1
    lengths = lengths[:count]
    lengths[-1] -= lengths.sum() - num_hidden
    num_kept = num_tokens - num_hidden
    if count > min(num_kept + 1, num_hidden):  # a handful of tokens: no room for spans that hide nothing
        lengths = lengths[lengths > 0]
    if lengths.size > num_kept + 1:  # more spans than places between kept tokens: the last ones join
        lengths = np.append(lengths[:num_kept], lengths[num_kept:].sum())
    places = np.flatnonzero(noise.chosen(num_kept + 1, lengths.size))
    return Gaps(places + np.cumsum(lengths) - lengths, lengths)


def infill(tokens: np.ndarray, gaps: Gaps, mask_id: int) -> np.ndarray:
    """`tokens` with one mask in place of each span; an empty span becomes a mask between two tokens."""
    hidden = np.zeros(tokens.size + 1, dtype=np.int64)
    full = gaps.lengths > 0
    np.add.at(hidden, gaps.starts[full], 1)
    np.add.at(hidden, gaps.starts[full] + gaps.lengths[full], -1)
    kept = np.cumsum(hidden[:-1]) == 0
    before = np.concatenate([[0], np.cumsum(kept)])  # kept tokens before each place
    return np.insert(tokens[kept], before[gaps.starts], mask_id)


def permute_sentences(noise: Noise, tokens: np.ndarray, is_end: np.ndarray) -> np.ndarray:
    """`tokens` with sentences shuffled; `is_end` bool [vocabulary] says which tokens end one."""
    ends = np.flatnonzero(is_end[tokens[:-1]]) + 1
    sentence = np.zeros(tokens.size, dtype=np.int64)
    sentence[ends] = 1
    turn = noise.permutation(ends.size + 1)
    return tokens[np.argsort(turn[np.cumsum(sentence)], kind="stable")]


@dataclass(frozen=True)
class Denoising:
    """Source: a damaged sample between start and end-of-text; target: the sample as it was.

    Args:
        is_end: bool [vocabulary], tokens that end a sentence; None leaves sentences in order.
        infill_ratio, mask_ratio, delete_ratio: parts of the tokens; rotate_rate: part of the samples.
    """

    seed: NoiseSeed
    num_raw: int
    source_length: int
    target_length: int
    special: SpecialIds
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
        start, end = [self.special.start], [self.end_of_text]
        damaged = self.damaged(tokens, sample["position"])
        source, mask = filled(np.concatenate([start, damaged, end]), self.source_length, self.special.pad)
        whole = np.concatenate([start, tokens, end])
        row, weights = shifted(self.end_of_text, whole, self.target_length, self.special.pad)
        return {"position": sample["position"], "source": source, "source_mask": mask, "tokens": row,
                "weights": weights}

    def damaged(self, tokens: np.ndarray, position: int) -> np.ndarray:
        """At most as many tokens as were given."""

        def noise(purpose: str) -> Noise:
            return Noise(self.seed, position, purpose)

        if self.is_end is not None:
            tokens = permute_sentences(noise("sentences"), tokens, self.is_end)
        num_hidden = round(tokens.size * self.infill_ratio)
        if num_hidden:
            gaps = draw_gaps(noise("infill"), tokens.size, num_hidden, self.mean_span)
            tokens = infill(tokens, gaps, self.special.mask)
        if self.mask_ratio:
            chosen = noise("mask").chosen(tokens.size, round(tokens.size * self.mask_ratio))
            tokens = np.where(chosen, self.special.mask, tokens)
        if self.delete_ratio:
            tokens = tokens[~noise("delete").chosen(tokens.size, round(tokens.size * self.delete_ratio))]
        if self.rotate_rate:
            chance = noise("rotate").uniform(2)
            if chance[0] < self.rotate_rate:
                tokens = np.roll(tokens, -int(chance[1] * tokens.size))
        return tokens
