"""BERT's stages: masked tokens, and pairs of segments for next-sentence prediction (Devlin et al. 2019, section 3.1).

Shapes: n tokens of the window, s of the row with its special tokens. Token fields are int64, `weights` float32. `seed`
is that of a RandomStream.
"""

from dataclasses import KW_ONLY, dataclass

import numpy as np

from data_pipeline.corruption.noise_seed import NoiseSeed
from data_pipeline.corruption.random_stream import RandomStream
from data_pipeline.corruption.special_ids import SpecialIds
from data_pipeline.samples import Dataset


def choose_words(random: RandomStream, starts: np.ndarray, count: int) -> np.ndarray:
    """bool [n]: whole words in random order for as long as they fit into `count` tokens, at least one token.

    Args:
        random: the stream to draw from.
        starts: bool [n], True where a token begins a word; the first token always does.
        count: tokens to choose at most.
    """
    word = np.cumsum(starts) - 1
    sizes = np.bincount(word)
    turn = random.permutation(sizes.size)
    taken = np.zeros(sizes.size, dtype=bool)
    taken[turn[np.cumsum(sizes[turn]) <= count]] = True
    chosen = taken[word]
    if not chosen.any():  # the first word drawn has more than `count` tokens
        chosen[np.flatnonzero(word == turn[0])[:count]] = True
    return chosen


class SegmentPairs:
    """Cuts a window in two at a random token, and takes half of the second segments from another window of the epoch.

    Args:
        dataset: the windows come from its samples.
        window_tokens: n.
        seed: of the random stream, and of the order that the windows come in; held-out windows come in their stored
            order.
    """

    def __init__(self, dataset: Dataset, window_tokens: int, seed: NoiseSeed) -> None:
        self.seed, self._arguments = seed, (dataset, window_tokens, seed)
        self.samples = dataset.samples(window_tokens, seed.run)

    def __reduce__(self) -> tuple:  # a worker makes the order by itself
        return SegmentPairs, self._arguments

    def __call__(self, tokens: np.ndarray, position: int) -> tuple[np.ndarray, int, bool]:
        """(tokens [n], length of the first segment, whether the second follows it in the text)."""
        chance = RandomStream(self.seed, position, "pair").uniform(3)
        cut = 1 + int(chance[0] * (tokens.size - 1))
        size = self.samples.per_epoch
        if chance[1] < 0.5 or size == 1:
            return tokens, cut, True
        epoch, turn = divmod(position, size)
        other = epoch * size + (turn + 1 + int(chance[2] * (size - 1))) % size
        not_next = self.samples.sample(other)["tokens"][: tokens.size - cut]
        return np.concatenate([tokens[:cut], not_next]), cut, False


@dataclass(frozen=True)
class Masking:
    """Masks tokens between [CLS] and [SEP]: each becomes a mask or a random token, or is left as it is.

    Args:
        seed: of the random stream.
        num_raw: n.
        num_masked: tokens to predict in a sample; fewer where whole words do not add up to it.
        special: ids of start ([CLS]), separator ([SEP]) and mask.
        vocab_size: ids of the tokenizer, from which random tokens come.
        masked_part: fraction of the predicted tokens that become a mask.
        random_part: fraction of the predicted tokens that become a random token.
        starts: bool [vocabulary], True for tokens that begin a word; None masks single tokens.
        pairs: makes a pair of segments from a window; None for one segment.
    """

    seed: NoiseSeed
    num_raw: int
    num_masked: int
    special: SpecialIds
    _: KW_ONLY
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
            tokens, cut, is_next = self.pairs(tokens, position)
            fields["not_next"] = np.asarray([int(not is_next)])
        chosen = self._choose(RandomStream(self.seed, position, "mask"), tokens)
        masked = self._replaced(RandomStream(self.seed, position, "replace"), tokens, chosen)
        start, separator = [self.special.start], [self.special.separator]
        second = [masked[cut:], separator] if self.pairs else []
        row = np.concatenate([start, masked[:cut], separator, *second])
        places = np.flatnonzero(chosen)
        positions, labels = np.zeros((2, self.num_masked), dtype=np.int64)
        positions[: places.size] = places + 1 + (places >= cut)
        labels[: places.size] = tokens[places]
        weights = (np.arange(self.num_masked) < places.size).astype(np.float32)
        types = (np.arange(row.size) >= cut + 2).astype(np.int64)
        return {**fields, "tokens": row, "types": types, "positions": positions, "labels": labels, "weights": weights}

    def _choose(self, random: RandomStream, tokens: np.ndarray) -> np.ndarray:
        if self.starts is None:
            return random.chosen(tokens.size, self.num_masked)
        starts = self.starts[tokens]
        starts[0] = True
        return choose_words(random, starts, self.num_masked)

    def _replaced(self, random: RandomStream, tokens: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        chance = random.uniform(tokens.size)
        others = random.below(self.vocab_size, tokens.size)
        shown = np.where(chance < self.masked_part, self.special.required("mask"), tokens)
        shown = np.where((chance >= self.masked_part) & (chance < self.masked_part + self.random_part), others, shown)
        return np.where(chosen, shown, tokens)
