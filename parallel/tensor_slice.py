"""Parts of global tensors: how a rank names the elements that it keeps, to whatever draws, reads or stores them.

A tensor rank holds a slice of a global tensor: the part `slice_rank` of `slice_size` equal ones along `slice_dim`. ZeRO
cuts the flattened slice over the replicas. A `SliceRange` is one such piece. Initial weights, checkpoints (both ways)
and the engine use this one description, so a rank touches no element that it does not keep.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple, Protocol

from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class SliceRange:
    """Elements [start, start + count) of a flattened slice of a global tensor.

    Args:
        name: the tensor's global name.
        kind: "weight", or a moment of Adam: "exp_avg", "exp_avg_sq".
        shape: the global shape.
        slice_dim: the dim that the tensor axis slices; None where each rank holds the tensor in full.
        slice_rank: which of `slice_size` slices this is.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    slice_dim: int | None
    slice_rank: int
    slice_size: int
    start: int
    count: int

    @classmethod
    def whole(cls, name: str, shape: tuple[int, ...], kind: str = "weight") -> SliceRange:
        """The whole global tensor."""
        return cls(name=name, kind=kind, shape=tuple(shape), slice_dim=None, slice_rank=0, slice_size=1, start=0,
                   count=prod(shape))

    @classmethod
    def slice(cls, name: str, shape: tuple[int, ...], slice_dim: int | None, *, rank: int, size: int,
              kind: str = "weight") -> SliceRange:
        """The slice that tensor rank `rank` of `size` holds; the whole tensor where `slice_dim` is None."""
        if slice_dim is None:
            return cls.whole(name, shape, kind)
        return cls(name=name, kind=kind, shape=tuple(shape), slice_dim=slice_dim, slice_rank=rank, slice_size=size,
                   start=0, count=prod(shape) // size)

    def part(self, start: int, count: int) -> SliceRange:
        """Elements [start, start + count) of this range, counted from its own start."""
        return replace(self, start=self.start + start, count=count)

    def chunks(self, max_count: int) -> Iterator[SliceRange]:
        """This range as consecutive ranges of at most `max_count` elements."""
        for start in range(0, self.count, max_count):
            yield self.part(start, min(max_count, self.count - start))

    @property
    def is_sliced(self) -> bool:
        return self.slice_dim is not None and self.slice_size > 1

    def runs(self) -> Iterator[tuple[int, int]]:
        """(start, length) of the contiguous runs of elements in the flattened global tensor, in the range's order."""
        period, width, offset = self._columns(self._own_period())
        position, end = self.start, self.start + self.count
        while position < end:
            row, column = divmod(position, width)
            length = min(width - column, end - position)
            yield row * period + offset + column, length
            position += length

    def _own_period(self) -> int:
        """The global elements from one contiguous run of the slice to the next."""
        return prod(self.shape[self.slice_dim :]) if self.is_sliced else max(1, prod(self.shape))

    def _columns(self, period: int) -> tuple[int, int, int]:
        """(period, width, offset): the slice holds `width` elements from `offset` on in each `period` global elements.

        A tensor that is held in full has that form with every period.
        """
        if not self.is_sliced:
            return period, period, 0
        width = period // self.slice_size
        return period, width, self.slice_rank * width


class Overlap(NamedTuple):
    """Elements that two ranges of one tensor share: where they begin in each, counted from the range's start."""

    wanted: int
    held: int
    num_elements: int


def overlaps(wanted: SliceRange, held: SliceRange) -> Iterator[Overlap]:
    """The elements of `wanted` that `held` has too, as runs that are contiguous in both; any two slicings."""
    if wanted.is_sliced and held.is_sliced and wanted.slice_dim != held.slice_dim:
        done = 0  # two dims have no common period: the runs of one are ranges of the unsliced tensor
        for start, length in wanted.runs():
            run = replace(wanted, slice_dim=None, slice_rank=0, slice_size=1, start=start, count=length)
            yield from (Overlap(done + found.wanted, found.held, found.num_elements) for found in overlaps(run, held))
            done += length
        return
    sliced = wanted if wanted.is_sliced else held
    period = sliced._own_period()
    _, width, offset = wanted._columns(period)
    _, held_width, held_offset = held._columns(period)
    low, high = max(offset, held_offset), min(offset + width, held_offset + held_width)
    if low >= high:
        return
    if width == held_width:  # the same slicing: both are intervals of one flattened slice
        start, end = max(wanted.start, held.start), min(wanted.start + wanted.count, held.start + held.count)
        if start < end:
            yield Overlap(start - wanted.start, start - held.start, end - start)
        return
    first = max(wanted.start // width, held.start // held_width)
    last = min((wanted.start + wanted.count - 1) // width, (held.start + held.count - 1) // held_width)
    for row in range(first, last + 1):
        # the column where each range begins and ends in this row, in elements of the period
        start = max(low, offset + wanted.start - row * width, held_offset + held.start - row * held_width)
        end = min(high, offset + wanted.start + wanted.count - row * width,
                  held_offset + held.start + held.count - row * held_width)
        if start < end:
            yield Overlap(row * width + start - offset - wanted.start,
                          row * held_width + start - held_offset - held.start, end - start)


def cut_from(whole: Tensor, wanted: SliceRange) -> Tensor:
    """The elements of a range out of the whole global tensor: flat [wanted.count]."""
    if wanted.slice_dim is not None and wanted.is_sliced:
        width = whole.shape[wanted.slice_dim] // wanted.slice_size
        whole = whole.narrow(wanted.slice_dim, wanted.slice_rank * width, width)
    return whole.reshape(-1)[wanted.start : wanted.start + wanted.count]


class OwnedFragment(NamedTuple):
    """A range of a global tensor that this rank holds, and that it alone stores; `tensor` is flat, `count` long."""

    range: SliceRange
    tensor: Tensor


class Source(Protocol):
    """Where an engine's weights and moments come from: drawn from the seed, or read from a checkpoint."""

    @property
    def adam_step(self) -> int:
        """The number of optimizer steps behind the moments."""

    def read(self, wanted: SliceRange) -> Tensor | None:
        """A flat fp32 tensor of `wanted.count` elements on the CPU; None for zeros."""
        ...
