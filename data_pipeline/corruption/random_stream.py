"""Random numbers for corrupting a sample: a function of (seed, position of the sample, purpose) and of nothing else.

So a sample is corrupted in the same way on every layout, by any worker and after every resume, and in another way in
the next epoch, where it has another position. Numbers are derived from a bit generator's raw output, which NumPy keeps
stable across versions. It does not promise that for its Generator methods, and a run must resume after an upgrade.
"""

from math import exp

import numpy as np

from common.seeding import derive_key
from data_pipeline.corruption.noise_seed import NoiseSeed


class RandomStream:
    """A stream of random numbers.

    Args:
        seed: of a run, or HELDOUT for data that is corrupted in the same way in every run.
        position: the sample's position in the run.
        purpose: of the numbers, such as "spans"; two purposes never share numbers.
    """

    def __init__(self, seed: NoiseSeed, position: int, purpose: str) -> None:
        self._bits = np.random.Philox(key=derive_key(str(seed), position, purpose))

    def uniform(self, size: int) -> np.ndarray:
        """float64 [size] in [0, 1)."""
        return (self._bits.random_raw(size) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def below(self, bound: int, size: int) -> np.ndarray:
        """int64 [size] in 0 .. bound - 1."""
        return (self.uniform(size) * bound).astype(np.int64)

    def permutation(self, size: int) -> np.ndarray:
        """int64 [size]: a shuffle of range(size)."""
        return np.argsort(self._bits.random_raw(size), kind="stable")

    def chosen(self, size: int, count: int) -> np.ndarray:
        """bool [size] with exactly `count` of them True; every such choice is equally likely."""
        mask = np.zeros(size, dtype=bool)
        mask[self.permutation(size)[:count]] = True
        return mask

    def poisson(self, mean: float, size: int) -> np.ndarray:
        """int64 [size] from a Poisson distribution, by its cumulative sum up to 12 standard deviations."""
        largest = int(mean + 12 * mean**0.5 + 12)
        steps = np.cumprod(np.concatenate([[exp(-mean)], mean / np.arange(1, largest + 1)]))
        return np.searchsorted(np.cumsum(steps), self.uniform(size), side="right").clip(max=largest).astype(np.int64)

    def segments(self, num_items: int, num_segments: int) -> np.ndarray:
        """int64 [num_segments], each at least 1, with the sum `num_items`; every such division is equally likely."""
        cuts = np.flatnonzero(self.chosen(num_items - 1, num_segments - 1)) + 1
        return np.diff(np.concatenate([[0], cuts, [num_items]]))
