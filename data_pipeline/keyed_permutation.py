"""Shuffles without arrays: the item at any place of an epoch, in constant time and memory, whatever the size."""

from __future__ import annotations

from collections import OrderedDict
from math import isqrt

from common.seeding import derive_key

MASK = 2**64 - 1
ROUNDS = 8
# As many blocks as a reader keeps shards open: enough places of a dataset for a mixed batch.
BLOCKS_TOGETHER = 128
# One group of blocks is open at a time, and the next while steps run across its end.
MAX_CACHED = 4


class KeyedPermutation:
    """A shuffle of range(size) given by a key: a Feistel network over two residues, walked until it stays inside.

    The generalized Feistel cipher with cycle walking of Black and Rogaway, "Ciphers with Arbitrary Finite Domains"
    (2002), sections 3 and 4: a place is a pair (left, right) below (a, b) with a * b >= size, and each round adds a
    hash of one half to the other. a * b exceeds the size by less than a, so a walk takes a second turn in about one of
    sqrt(size) cases.

    Args:
        size: at least 1.
        key: 128 bits.
    """

    def __init__(self, size: int, key: int) -> None:
        self.size = size
        self._left = isqrt(size - 1) + 1
        self._right = -(-size // self._left)
        low, high = key & MASK, key >> 64
        self._keys = [_mixed(low + number * (high | 1)) for number in range(ROUNDS)]

    def __call__(self, place: int) -> int:
        """The item at a place below `size`."""
        while True:
            left, right = divmod(place, self._right)
            for number in range(0, ROUNDS, 2):
                left = (left + _mixed(right ^ self._keys[number])) % self._left
                right = (right + _mixed(left ^ self._keys[number + 1])) % self._right
            place = left * self._right + right
            if place < self.size:
                return place


class BlockShuffle:
    """Each epoch's order of `size` items that lie in blocks, read from few blocks at a time.

    The blocks are shuffled, and the items of `together` blocks at a time are shuffled among each other. A set of no
    more than `together` blocks is shuffled as a whole. Where the blocks do not divide the items, the walk that steps
    over what is missing takes fewer items than there are blocks from other blocks than the open ones.

    Args:
        size: items of an epoch.
        block: about how many neighbours make a block.
        seed: the run's seed; None keeps the stored order.
        purpose: what is shuffled, so that two shuffles of a run differ.
        together: about how many blocks are open at a time.
    """

    def __init__(self, size: int, *, block: int, seed: int | None, purpose: str, together: int = BLOCKS_TOGETHER
                 ) -> None:
        self.size, self.seed, self.purpose = size, seed, purpose
        num_blocks = -(-size // block)
        self.block = -(-size // num_blocks)
        self.num_blocks = -(-size // self.block)
        num_groups = -(-self.num_blocks // together)
        self.together = -(-self.num_blocks // num_groups)
        self._made: OrderedDict[tuple, KeyedPermutation] = OrderedDict()

    def locate(self, position: int) -> tuple[int, int]:
        """(epoch, item) at a position that goes on through the epochs."""
        epoch, place = divmod(position, self.size)
        if self.seed is None:
            return epoch, place
        item = self._item(epoch, place)
        while item >= self.size:
            item = self._item(epoch, item)
        return epoch, item

    def _item(self, epoch: int, place: int) -> int:
        """The item at a place, where all blocks are full."""
        group, place_in_group = divmod(place, self.together * self.block)
        first = group * self.together
        num_blocks = min(self.together, self.num_blocks - first)
        turn, place_in_block = divmod(self._permutation(num_blocks * self.block, epoch, group)(place_in_group),
                                      self.block)
        return self._permutation(self.num_blocks, epoch, "blocks")(first + turn) * self.block + place_in_block

    def _permutation(self, size: int, epoch: int, part: int | str) -> KeyedPermutation:
        made = self._made.get((epoch, part))
        if made is None:
            made = KeyedPermutation(size, derive_key(f"{self.seed}/{epoch}", self.purpose, part))
            self._made[epoch, part] = made
            if len(self._made) > MAX_CACHED:
                self._made.popitem(last=False)
        else:
            self._made.move_to_end((epoch, part))
        return made


def _mixed(value: int) -> int:
    """64 bits that all depend on all bits of `value`: the finalizer of SplitMix64 (Steele et al. 2014, figure 17)."""
    value &= MASK
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & MASK
    return value ^ (value >> 31)
