"""The cut into stages: no cut has a cheaper most expensive stage, and a head counts with its cost."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parallel.pipeline_stages import cut
from parallel.tensor_parallel import TensorParallel
from pretrain.models.build import layer_list
from pretrain.models.gpt.spec import GPTConfig


def most_expensive(costs, bounds):
    return max(sum(costs[begin:end]) for begin, end in zip(bounds[:-1], bounds[1:], strict=True))


@given(st.lists(st.integers(0, 20), min_size=1, max_size=9), st.integers(1, 5), st.data())
def test_no_cut_has_a_cheaper_most_expensive_stage(costs, num_stages, data):
    joined = data.draw(st.lists(st.booleans(), min_size=len(costs) - 1, max_size=len(costs) - 1)) + [False]
    places = [place for place in range(1, len(costs)) if not joined[place - 1]]
    every = [[0, *chosen, len(costs)] for chosen in combinations(places, num_stages - 1)]
    if not every:
        with pytest.raises(ValueError, match="cannot fill"):
            cut(costs, num_stages, joined)
        return
    found = cut(costs, num_stages, joined)
    assert most_expensive(costs, found) == min(most_expensive(costs, bounds) for bounds in every)
    assert found in every


def blocks_of_stages(num_stages, **model):
    """How many blocks each stage of a GPT gets."""
    config = GPTConfig(hidden=64, heads=4, sequence_length=32, **model)
    specs = layer_list(config, TensorParallel(None, torch.device("cpu")))
    bounds = cut([spec.cost for spec in specs], num_stages)
    return [sum(spec.recompute for spec in specs[begin:end])
            for begin, end in zip(bounds[:-1], bounds[1:], strict=True)]


@pytest.mark.parametrize(("num_layers", "num_stages", "vocab_size", "expected"), [
    (8, 2, 16, [4, 4]),
    (8, 2, 2 * 12 * 64, [5, 3]),  # a head as expensive as two blocks
    (8, 4, 2 * 12 * 64, [3, 2, 2, 1]),
    (5, 3, 16, [2, 2, 1]),
], ids=str)  # fmt: skip
def test_the_head_counts_and_blocks_need_not_divide(num_layers, num_stages, vocab_size, expected):
    found = blocks_of_stages(num_stages, layers=num_layers, vocab_size=vocab_size)
    assert sum(found) == num_layers
    assert sorted(found[:-1], reverse=True) + found[-1:] == expected
