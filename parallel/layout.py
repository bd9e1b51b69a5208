"""Where each rank stands on each axis, in pure integers (no torch).

The order is megatron-core's default, `tp-cp-ep-dp-pp`, and that of DeepSpeed's `PipeModelDataParallelTopology`: tensor
ranks are neighbours, then context ranks, then data ranks, and stages are furthest apart.

*Replicas* are the cp x dp ranks that hold the same weights: what DeepSpeed and ZeRO know as data ranks. Samples are
spread over dp alone; the context ranks of a data rank share out the sequence of the same samples.

Expert parallelism adds no ranks: `expert` neighbours along dp share the experts of a layer out among them (an `ep`
group), and the ranks that hold the same ones form an `edp` group.
"""

from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import product
from math import prod
from typing import NamedTuple, Protocol

AXES = ("tp", "cp", "dp", "pp")  # from the fastest to the slowest; a further axis takes its place in this order
GROUPS = {  # group name: the axes it runs along; ep and edp are the two directions of dp
    "tp": ("tp",), "cp": ("cp",), "dp": ("dp",), "pp": ("pp",), "ep": ("ep",), "edp": ("cp", "edp"),
    "model": ("tp", "ep", "pp"), "replicas": ("cp", "dp"),
}  # fmt: skip


class Degrees(Protocol):
    """What `Layout.of` reads from a config."""

    tensor: int
    context: int
    pipeline: int
    sequence: bool
    expert: int


class Coordinates(NamedTuple):
    """A rank's index on every axis, each from 0."""

    tp: int
    cp: int
    dp: int
    pp: int


@dataclass(frozen=True)
class Layout:
    """The set of degrees of a run. `sequence` and `expert` add no ranks: they reuse the tensor and the data ranks."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    sequence: bool = False
    _: KW_ONLY
    context: int = 1
    expert: int = 1

    def __post_init__(self) -> None:
        if min(self.tensor, self.context, self.pipeline, self.data, self.expert) < 1:
            raise ValueError(f"every degree of a layout is at least 1, not {self}")
        if self.data % self.expert:
            raise ValueError(f"{self.data} data ranks do not divide into groups of {self.expert} that share experts")

    @classmethod
    def of(cls, parallel: Degrees, world_size: int) -> "Layout":
        """The layout of `parallel` on `world_size` ranks.

        Raises ValueError when they do not divide; `parallel.rules.table` tells the user before that.
        """
        model_ranks = parallel.tensor * parallel.context * parallel.pipeline
        if world_size < 1 or world_size % model_ranks:
            raise ValueError(f"{world_size} ranks do not divide into models of {model_ranks} ranks")
        return cls(parallel.tensor, parallel.pipeline, world_size // model_ranks, parallel.sequence,
                   context=parallel.context, expert=parallel.expert)

    @property
    def degrees(self) -> dict[str, int]:
        """The number of ranks along each axis, in the order of AXES."""
        return {"tp": self.tensor, "cp": self.context, "dp": self.data, "pp": self.pipeline}

    @property
    def words(self) -> str:
        """The degrees as a person reads them; the context and the expert degree where there is one."""
        context = f"context {self.context} × " if self.context > 1 else ""
        experts = f" (experts over {self.expert})" if self.expert > 1 else ""
        return f"tensor {self.tensor} × {context}pipeline {self.pipeline} × data {self.data}{experts}"

    @property
    def replicas(self) -> int:
        """How many ranks hold the same weights."""
        return self.context * self.data

    @property
    def world_size(self) -> int:
        return prod(self.degrees.values())

    def coordinates(self, rank: int) -> Coordinates:
        """Where `rank` stands. Raises ValueError for a rank outside the world."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is not in a world of {self.world_size} ranks")
        found = {}
        for axis, degree in self.degrees.items():
            rank, found[axis] = divmod(rank, degree)
        return Coordinates(**found)

    def rank(self, tp: int = 0, cp: int = 0, dp: int = 0, pp: int = 0) -> int:
        """The rank at these coordinates. Raises ValueError when one is outside its axis."""
        indices = {"tp": tp, "cp": cp, "dp": dp, "pp": pp}
        number = 0
        for axis in reversed(AXES):
            degree = self.degrees[axis]
            if not 0 <= indices[axis] < degree:
                raise ValueError(f"{axis} index {indices[axis]} is outside 0..{degree - 1}")
            number = number * degree + indices[axis]
        return number

    def group(self, name: str, rank: int) -> list[int]:
        """The ranks, ascending, that `rank` shares the group `name` (a key of GROUPS) with, itself included."""
        along = GROUPS[name]
        here = self.coordinates(rank)._asdict()
        choices = [self._indices(axis, here[axis], along) for axis in AXES]
        return sorted(self.rank(**dict(zip(AXES, indices, strict=True))) for indices in product(*choices))

    def _indices(self, axis: str, index: int, along: tuple[str, ...]) -> Sequence[int]:
        """The indices on `axis` of a group along these axes, seen from a rank at `index`."""
        if axis in along:
            return range(self.degrees[axis])
        if axis == "dp" and "ep" in along:
            return range(index - index % self.expert, index - index % self.expert + self.expert)
        if axis == "dp" and "edp" in along:
            return range(index % self.expert, self.data, self.expert)
        return [index]

    def replica(self, rank: int) -> int:
        """The place of `rank` among those that hold the same weights."""
        return self.group("replicas", rank).index(rank)

    def groups(self, name: str) -> list[list[int]]:
        """Every group of this name; together they hold each rank once."""
        found = {tuple(self.group(name, rank)) for rank in range(self.world_size)}
        return [list(group) for group in sorted(found)]


def legal(world_size: int) -> Iterator[Layout]:
    """Every (tensor, context, pipeline, data) whose product is `world_size`, without sequence parallelism."""
    for tensor in divisors(world_size):
        for context in divisors(world_size // tensor):
            for pipeline in divisors(world_size // (tensor * context)):
                yield Layout(tensor, pipeline, world_size // (tensor * context * pipeline), context=context)


def divisors(number: int) -> list[int]:
    """The divisors of a positive integer, ascending."""
    small = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})
