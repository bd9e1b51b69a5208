"""A shuffle without an array is a shuffle: each item once, and by chance as good as a sorted one."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.seeding import derive_key
from data_pipeline.keyed_permutation import BlockShuffle, KeyedPermutation

LARGE = 20_011


def shuffled(size: int, *key: object) -> list[int]:
    return list(map(KeyedPermutation(size, derive_key(0, *key)), range(size)))


@given(st.integers(1, 3000), st.integers(0, 2**128 - 1))
def test_each_item_once(size, key):
    assert sorted(map(KeyedPermutation(size, key), range(size))) == list(range(size))


@given(st.integers(1, 500), st.integers(1, 40), st.integers(1, 6), st.integers(0, 2**63), st.integers(0, 3))
def test_blocks_hold_each_item_once(size, block, together, seed, epoch):
    shuffle = BlockShuffle(size, block=block, together=together, seed=seed, purpose="test")
    found = [shuffle.locate(position) for position in range(epoch * size, (epoch + 1) * size)]
    assert sorted(found) == [(epoch, item) for item in range(size)]


def test_keys_epochs_seeds_and_purposes_differ():
    shuffles = [BlockShuffle(50, block=4, seed=seed, purpose=purpose) for seed in (1, 2) for purpose in ("a", "b")]
    orders = [tuple(shuffle.locate(50 * epoch + place)[1] for place in range(50))
              for shuffle in shuffles for epoch in (0, 1)]
    assert len(set(orders)) == 8


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_order_of_few_items_is_about_as_frequent(size):
    """Chi-square over all orders, five standard deviations allowed."""
    orders = math.factorial(size)
    counts = Counter(tuple(shuffled(size, "few", draw)) for draw in range(200 * orders))
    assert len(counts) == orders
    assert sum((count - 200) ** 2 / 200 for count in counts.values()) < orders - 1 + 5 * math.sqrt(2 * (orders - 1))


@pytest.mark.parametrize("size", [12, 1000])
def test_the_first_item_is_uniform(size):
    draws = 10 * size
    counts = np.bincount([KeyedPermutation(size, derive_key(0, "first", draw))(0) for draw in range(draws)],
                         minlength=size)
    assert ((counts - 10) ** 2 / 10).sum() < size - 1 + 5 * math.sqrt(2 * (size - 1))


@pytest.mark.parametrize("order", [
    np.array(shuffled(LARGE, "large")), np.argsort(np.random.Philox(key=5).random_raw(LARGE))], ids=["keyed", "sorted"])
def test_neighbours_are_as_far_apart_as_in_a_sorted_shuffle(order):
    """Within five standard deviations of chance: serial correlation 0, mean distance a third, one neighbour kept."""
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 5 / math.sqrt(LARGE)
    distance = np.abs(np.diff(order)) / LARGE
    assert abs(distance.mean() - 1 / 3) < 5 * math.sqrt(1 / 18 / LARGE)
    assert (np.abs(np.diff(order)) == 1).sum() < 2 + 5 * math.sqrt(2)
