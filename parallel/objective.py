"""The contract between the engine and a loss: named terms, each with its own denominator; and one micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from parallel.context_parallel import ContextParallel

Batch = dict[str, Tensor]


class Batches(Protocol):
    """This rank's batches of an evaluation; every data rank has the same number of them. A list is one."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Batch]: ...


class ObjectiveTerms(Protocol):
    """The terms of a loss, and what they take of a batch: a dict of tensors with the micro-batch as first dim."""

    terms: Mapping[str, float]  # the weight of each term, by name; the same on every rank

    def inputs(self, batch: Batch) -> Any:
        """What the model's first layer takes: a tensor or a tuple of tensors."""
        ...

    def targets(self, batch: Batch) -> tuple[Tensor, ...]:
        """What `losses` needs beside the model's outputs."""
        ...

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """By term, a scalar: the number of targets in the batch that the term averages over."""
        ...


class Objective(ObjectiveTerms, Protocol):
    """A loss of one or more named terms: loss = sum over terms of weight x (sum of the term's losses / its count).

    Sums and counts run over the whole global batch, so the loss is the same on every layout and for every size of
    micro-batch. `SequenceObjective` can be cut along the sequence. A loss that couples all samples of the global batch
    is a `TwoPassObjective` (parallel/gradient_cache.py).
    """

    def losses(self, outputs: Any, targets: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """By term, a scalar fp32: the sum of the losses of those targets; 0 where the batch holds none."""
        ...


class SequenceObjective(Objective, Protocol):
    """A loss that context ranks can compute in parts."""

    def part(self, batch: Batch, context: ContextParallel) -> Batch:
        """The batch of one context rank."""
        ...


class MicroBatch(NamedTuple):
    """What one forward and its loss take.

    Args:
        inputs: a tensor or a tuple of tensors, for the first layer.
        targets: for `Objective.losses`.
        weights: fp32 [terms], factors that turn the sums of this micro-batch into its share of each term's mean.
        counts: fp64 [terms], the targets of each term in this micro-batch.
    """

    inputs: Any
    targets: tuple[Tensor, ...]
    weights: Tensor
    counts: Tensor

    def for_pipeline(self) -> tuple[Any, tuple[Tensor, ...]]:
        """(inputs, labels): the form in which DeepSpeed's pipeline engine takes it."""
        return self.inputs, (*self.targets, self.weights, self.counts)

    @classmethod
    def of_labels(cls, labels: tuple[Tensor, ...]) -> MicroBatch:
        """What the last stage has of it: all but the inputs."""
        *targets, weights, counts = labels
        return cls(None, tuple(targets), weights, counts)

    def without_weight(self) -> MicroBatch:
        """The same forward, without effect on any term."""
        return self._replace(weights=self.weights * 0, counts=self.counts * 0)


# A loss as a forward takes it: from the model's outputs to a scalar.
LossFunction = Callable[[Any], Tensor]
