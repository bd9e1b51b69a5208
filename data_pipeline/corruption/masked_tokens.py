"""Hiding tokens for an encoder to predict (Devlin et al. 2019, section 3.1), and pairs of segments for it to judge."""

from dataclasses import dataclass

import numpy as np

from data_pipeline.corruption.noise_seed import NoiseSeed
from data_pipeline.corruption.random_stream import Noise
from data_pipeline.corruption.special_ids import SpecialIds
from data_pipeline.order import WindowOrder
from data_pipeline.tokens.token_dataset import TokenDataset


def choose_words(noise: Noise, starts: np.ndarray, count: int) -> np.ndarray:
    """bool [n]: whole words in random order for as long as they fit into `count` tokens, at least one token.

    Args:
        starts: bool [n], True where a token begins a word; the first token always does.
    """
    word = np.cumsum(starts) - 1
    sizes = np.bincount(word)
    turn = noise.permutation(sizes.size)
    taken = np.zeros(sizes.size, dtype=bool)
    taken[turn[np.cumsum(sizes[turn]) <= count]] = True
    chosen = taken[word]
    if not chosen.any():  # the first word drawn is longer than all that may be hidden
        chosen[np.flatnonzero(word == turn[0])[:count]] = True
    return chosen


class SegmentPairs:
    """Cuts a window in two at a random token, and takes half of the second parts from another window of the epoch.

    Args: `window_tokens` and `seed` are those of the order that the windows come in; held-out windows come in their
    stored order.
    """

    def __init__(self, dataset: TokenDataset, window_tokens: int, seed: NoiseSeed) -> None:
        self.dataset, self.seed, self._arguments = dataset, seed, (dataset, window_tokens, seed)
        self.order = WindowOrder(dataset.token_counts, window_tokens, seed.run)

    def __reduce__(self) -> tuple:  # a worker makes the order by itself
        return SegmentPairs, self._arguments

    def __call__(self, tokens: np.ndarray, position: int) -> tuple[np.ndarray, int, bool]:
        """(tokens [n], length of the first segment, whether the second follows it in the text)."""
        noise = Noise(self.seed, position, "pair")
        chance = noise.uniform(3)
        cut = 1 + int(chance[0] * (tokens.size - 1))
        order = self.order
        size = order.windows_per_epoch
        if chance[1] < 0.5 or size == 1:
            return tokens, cut, True
        epoch, turn = divmod(position, size)
        other = epoch * size + (turn + 1 + int(chance[2] * (size - 1))) % size
        strange = self.dataset.window(order.pieces(other))[: tokens.size - cut]
        return np.concatenate([tokens[:cut], strange]), cut, False


@dataclass(frozen=True)
class Masking:
    """Hides tokens between the special ones that frame them; each is replaced by a mask, by a random token, or stays.

    Args:
        num_masked: tokens to predict in a sample; fewer where whole words do not add up to it.
        vocab_size: ids of the tokenizer, from which random tokens come.
        starts: bool [vocabulary], tokens that begin a word; None hides single tokens.
        pairs: makes a pair of segments from a window; None for one segment.
    """

    seed: NoiseSeed
    num_raw: int
    num_masked: int
    special: SpecialIds
    vocab_size: int
    masked_part: float
    random_part: float
    starts: np.ndarray | None = None
    pairs: SegmentPairs | None = None

    def __call__(self, sample: dict) -> dict:
        """Fields `tokens`, `types` [s], `positions`, `labels`, `weights` [num_masked]; `not_next` [1] with pairs."""
        position, tokens = sample["position"], sample["tokens"][: self.num_raw]
        fields, cut = {"position": position}, tokens.size
        if self.pairs:
            tokens, cut, follows = self.pairs(tokens, position)
            fields["not_next"] = np.asarray([int(not follows)])
        chosen = self._choose(Noise(self.seed, position, "mask"), tokens)
        noisy = self._replaced(Noise(self.seed, position, "replace"), tokens, chosen)
        start, separator = [self.special.start], [self.special.separator]
        second = [noisy[cut:], separator] if self.pairs else []
        row = np.concatenate([start, noisy[:cut], separator, *second])
        places = np.flatnonzero(chosen)
        positions, labels = np.zeros((2, self.num_masked), dtype=np.int64)
        positions[: places.size] = places + 1 + (places >= cut)
        labels[: places.size] = tokens[places]
        weights = (np.arange(self.num_masked) < places.size).astype(np.float32)
        types = (np.arange(row.size) >= cut + 2).astype(np.int64)
        return {**fields, "tokens": row, "types": types, "positions": positions, "labels": labels, "weights": weights}

    def _choose(self, noise: Noise, tokens: np.ndarray) -> np.ndarray:
        if self.starts is None:
            return noise.chosen(tokens.size, self.num_masked)
        starts = self.starts[tokens]
        starts[0] = True
        return choose_words(noise, starts, self.num_masked)

    def _replaced(self, noise: Noise, tokens: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        chance = noise.uniform(tokens.size)
        others = noise.below(self.vocab_size, tokens.size)
        shown = np.where(chance < self.masked_part, self.special.mask, tokens)
        shown = np.where((chance >= self.masked_part) & (chance < self.masked_part + self.random_part), others, shown)
        return np.where(chosen, shown, tokens)
