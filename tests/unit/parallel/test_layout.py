"""Layouts are pure integers, so every layout of 1 to 32 ranks is tried."""

from dataclasses import replace
from itertools import product
from math import prod

import pytest

from parallel.config import ParallelConfig
from parallel.layout import AXES, GROUPS, Layout, divisors, legal

ALL = [layout for world_size in range(1, 33) for layout in legal(world_size)]
ALL += [replace(layout, expert=expert) for layout in ALL if layout.context == 1 and layout.world_size <= 24
        for expert in divisors(layout.data)[1:]]


def test_legal_lists_every_factorisation_once():
    for world_size in range(1, 65):
        found = [(layout.tensor, layout.context, layout.pipeline, layout.data) for layout in legal(world_size)]
        numbers = range(1, world_size + 1)
        every = [degrees for degrees in product(numbers, repeat=4) if prod(degrees) == world_size] \
            if world_size <= 12 else found
        assert sorted(found) == sorted(every)
        assert len(set(found)) == len(found)
        assert all(prod(degrees) == world_size for degrees in found)


def test_rank_is_the_inverse_of_coordinates():
    for layout in ALL:
        for rank in range(layout.world_size):
            at = layout.coordinates(rank)
            assert layout.rank(*at) == rank
            assert rank == at.tp + layout.tensor * (at.cp + layout.context * (at.dp + layout.data * at.pp))


@pytest.mark.parametrize("name", GROUPS)
def test_groups_partition_the_ranks(name):
    for layout in ALL:
        degrees = {**layout.degrees, "ep": layout.expert, "edp": layout.data // layout.expert}
        size = prod(degrees[axis] for axis in GROUPS[name])
        groups = layout.groups(name)
        assert sorted(rank for group in groups for rank in group) == list(range(layout.world_size))
        assert all(len(group) == size for group in groups)


@pytest.mark.parametrize("name", GROUPS)
def test_members_of_a_group_differ_along_its_axes_only(name):
    for layout in (layout for layout in ALL if layout.world_size in (16, 24)):
        for rank in range(layout.world_size):
            here = layout.coordinates(rank)
            group = layout.group(name, rank)
            assert rank in group
            for other in map(layout.coordinates, group):
                same = {axis: getattr(here, axis) == getattr(other, axis) for axis in AXES}
                same["ep"] = here.dp % layout.expert == other.dp % layout.expert
                same["edp"] = here.dp // layout.expert == other.dp // layout.expert
                along = {*GROUPS[name], *(("dp",) if {"ep", "edp"} & {*GROUPS[name]} else ())}
                along |= {"ep", "edp"} if "dp" in GROUPS[name] else set()
                assert all(same[axis] for axis in same if axis not in along)


def test_order_tensor_then_context_then_data_then_pipeline():
    layout = Layout(tensor=2, pipeline=2, data=2)
    assert [tuple(layout.coordinates(rank)) for rank in range(8)] == [
        (0, 0, 0, 0), (1, 0, 0, 0), (0, 0, 1, 0), (1, 0, 1, 0), (0, 0, 0, 1), (1, 0, 0, 1), (0, 0, 1, 1), (1, 0, 1, 1)]
    assert layout.group("tp", 5) == [4, 5]
    assert layout.group("dp", 5) == [5, 7]
    assert layout.group("pp", 5) == [1, 5]
    assert layout.group("model", 5) == [0, 1, 4, 5]
    layout = Layout(tensor=2, data=2, context=2)
    assert [tuple(layout.coordinates(rank))[:3] for rank in range(8)] == [
        (0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1), (1, 1, 1)]
    assert layout.group("cp", 5) == [5, 7]
    assert layout.group("replicas", 5) == [1, 3, 5, 7]
    assert [layout.replica(rank) for rank in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_words():
    assert Layout(tensor=2, data=4).words == "tensor 2 × pipeline 1 × data 4"
    assert Layout(tensor=2, context=2, pipeline=3).words == "tensor 2 × context 2 × pipeline 3 × data 1"


def test_experts_are_shared_by_neighbours_along_dp():
    layout = Layout(tensor=2, pipeline=2, data=4, expert=2)
    assert layout.group("ep", 1) == [1, 3]
    assert layout.group("edp", 1) == [1, 5]
    assert layout.group("ep", 14) == [12, 14]
    assert layout.group("model", 0) == [0, 1, 2, 3, 8, 9, 10, 11]
    with pytest.raises(ValueError, match="4 data ranks do not divide into groups of 3"):
        Layout(data=4, expert=3)


def test_of_takes_the_data_degree_from_the_world():
    parallel = ParallelConfig(context=2, pipeline=3, micro_batch=1, global_batch=4)
    assert Layout.of(parallel, 24) == Layout(pipeline=3, data=4, context=2)
    parallel = ParallelConfig(tensor=2, sequence=True, pipeline=3, micro_batch=1, global_batch=4)
    assert Layout.of(parallel, 24) == Layout(tensor=2, pipeline=3, data=4, sequence=True)


@pytest.mark.parametrize("world_size", [0, -6, 5, 7])
def test_of_refuses_a_world_that_does_not_divide(world_size):
    parallel = ParallelConfig(tensor=2, pipeline=3, micro_batch=1, global_batch=4)
    with pytest.raises(ValueError, match=f"{world_size} ranks"):
        Layout.of(parallel, world_size)


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        Layout(tensor=0)
    layout = Layout(tensor=2, data=2)
    with pytest.raises(ValueError, match="rank 4"):
        layout.coordinates(4)
    with pytest.raises(ValueError, match="rank -1"):
        layout.coordinates(-1)
    with pytest.raises(ValueError, match="dp index 2"):
        layout.rank(dp=2)
    with pytest.raises(KeyError):
        layout.group("xp", 0)


def test_divisors():
    assert divisors(1) == [1]
    assert divisors(36) == [1, 2, 3, 4, 6, 9, 12, 18, 36]
    for number in range(1, 500):
        assert divisors(number) == [n for n in range(1, number + 1) if number % n == 0]
