"""The randomness of a sample: a function of (seed, position of the sample, purpose) and of nothing else.

So a sample is noised in the same way on every layout, by any worker and after every resume; and differently in the next
epoch, where its position is another. Numbers are derived from a bit generator's raw output, which NumPy keeps stable
across versions; it does not promise that of its Generator methods, and a run must resume after an upgrade.
"""

import hashlib
from math import exp

import numpy as np

from data_pipeline.corruption.noise_seed import NoiseSeed


class Noise:
    """A stream of random numbers.

    Args:
        seed: of a run, or HELDOUT for data whose noise no run may change.
        position: the sample's position in the run.
        purpose: what the numbers are for; two purposes never share numbers.
    """

    def __init__(self, seed: NoiseSeed, position: int, purpose: str) -> None:
        digest = hashlib.sha256(f"{seed}/{position}/{purpose}".encode()).digest()
        self._bits = np.random.Philox(key=int.from_bytes(digest[:16], "little"))

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
        """bool [size] with exactly `count` of them True, every choice equally likely."""
        mask = np.zeros(size, dtype=bool)
        mask[self.permutation(size)[:count]] = True
        return mask

    def poisson(self, mean: float, size: int) -> np.ndarray:
        """int64 [size] from a Poisson distribution, by its cumulative sum up to 12 standard deviations."""
        largest = int(mean + 12 * mean**0.5 + 12)
        steps = np.cumprod(np.concatenate([[exp(-mean)], mean / np.arange(1, largest + 1)]))
        return np.searchsorted(np.cumsum(steps), self.uniform(size), side="right").clip(max=largest).astype(np.int64)

    def segments(self, num_items: int, num_segments: int) -> np.ndarray:
        """int64 [num_segments], each at least 1, of sum `num_items`: a random cut, every cut equally likely."""
        cuts = np.flatnonzero(self.chosen(num_items - 1, num_segments - 1)) + 1
        return np.diff(np.concatenate([[0], cuts, [num_items]]))
