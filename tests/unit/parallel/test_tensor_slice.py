"""Ranges of slices: which elements they hold, and which two of them share."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from parallel.tensor_slice import SliceRange, cut_from, overlaps

SIZES = st.sampled_from([1, 2, 4, 8])


@st.composite
def ranges(draw, shape: tuple[int, ...]) -> SliceRange:
    """A piece of a slice, as ZeRO cuts it, along any dim."""
    dim = draw(st.none() | st.integers(0, len(shape) - 1))
    size = draw(SIZES.filter(lambda size: dim is None or shape[dim] % size == 0))
    held = SliceRange.slice("a", shape, dim, rank=draw(st.integers(0, size - 1)), size=size)
    start = draw(st.integers(0, held.count - 1))
    return held.part(start, draw(st.integers(1, held.count - start)))


SHAPES = st.sampled_from([(24,), (8, 16), (16, 8), (5, 8), (8, 3), (2, 8, 8), (8, 3, 16)])


def indices(part: SliceRange) -> torch.Tensor:
    """The places of a range's elements in the flattened global tensor, by the definition of a slice."""
    return cut_from(torch.arange(torch.Size(part.shape).numel()).view(part.shape), part)


@given(st.data(), SHAPES)
def test_runs_are_the_elements_of_the_slice(data, shape):
    part = data.draw(ranges(shape))
    runs = [torch.arange(start, start + length) for start, length in part.runs()]
    assert torch.equal(torch.cat(runs), indices(part))


@given(st.data(), SHAPES)
def test_overlaps_are_the_elements_that_both_hold(data, shape):
    wanted, held = data.draw(ranges(shape)), data.draw(ranges(shape))
    ours, theirs = indices(wanted), indices(held)
    found = []
    for same in overlaps(wanted, held):
        assert same.num_elements > 0
        piece = ours[same.wanted : same.wanted + same.num_elements]
        assert torch.equal(piece, theirs[same.held : same.held + same.num_elements])
        found += piece.tolist()
    assert sorted(found) == sorted({*ours.tolist()} & {*theirs.tolist()})


@given(st.data(), SHAPES, st.integers(1, 40))
def test_chunks_are_the_range_in_order(data, shape, most):
    part = data.draw(ranges(shape))
    chunks = list(part.chunks(most))
    assert max(chunk.count for chunk in chunks) <= most
    assert torch.equal(torch.cat([indices(chunk) for chunk in chunks]), indices(part))


def test_the_same_slicing_is_one_run():
    wanted = SliceRange.slice("a", (64, 64), 1, rank=3, size=8).part(5, 300)
    held = SliceRange.slice("a", (64, 64), 1, rank=3, size=8).part(0, 256)
    assert list(overlaps(wanted, held)) == [(0, 5, 251)]
