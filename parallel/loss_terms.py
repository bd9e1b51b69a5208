"""The terms of an objective over one step: denominators before the forward, sums during it, means on every rank after.

DeepSpeed's pipeline engine returns one scalar, and only the last stage computes losses. So each term's sum is kept
where the loss is computed, and one small reduction hands all of them to every rank at the end of the step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.objective import Batch, LossFunction, MicroBatch, Objective, SequenceObjective
from parallel.process_groups import Groups
from parallel.tensor_parallel import TensorParallel


@dataclass(frozen=True)
class Losses:
    """Means over the global batch, the same on every rank.

    `loss` is the weighted sum of `terms`. A term without a target in the global batch adds nothing to `loss` and is
    None in `terms`.
    """

    loss: float
    terms: dict[str, float | None]


class LossTerms:
    """Makes micro-batches whose weights give exact means, computes the loss, and reports every term."""

    def __init__(self, objective: Objective, groups: Groups, tp: TensorParallel, num_micro_batches: int):
        """`num_micro_batches`: those of one rank in one step."""
        self.objective, self.groups, self.layout, self.tp = objective, groups, groups.layout, tp
        self.names = tuple(objective.terms)
        # DeepSpeed divides a gradient by the number of micro-batches and averages it over the replicas.
        self.averaged_over = num_micro_batches * self.layout.replicas
        self.begin_step()

    def begin_step(self, tally: int = 0) -> None:
        """Forget the sums so far; the micro-batches of a training step follow.

        `tally`: a number of this data rank, summed over the data ranks with the losses, so without a collective of its
        own. `means` leaves the sum in `self.tally`, on every rank. Ranks without batches have none.
        """
        self._begin(self.averaged_over, tally)

    def begin_evaluation(self) -> None:
        """Forget the sums so far; the micro-batches of an evaluation follow."""
        self._begin(1)

    def _begin(self, divisor: int, tally: int = 0) -> None:
        self._divisor, self.tally = divisor, tally
        self._sums = torch.zeros(len(self.names), device=self.tp.device)
        self._counts = torch.zeros(len(self.names), dtype=torch.float64, device=self.tp.device)

    # -- micro-batches ------------------------------------------------------------------------------------------------

    def for_step(self, batches: Iterable[Batch]) -> list[MicroBatch]:
        """The micro-batches of a step, weighted so that DeepSpeed's averages become means over the global batch.

        weight of a term = micro-batches x replicas / targets of the term in the global batch; 0 where there is none.
        """
        micro_batches = [self._micro_batch(batch) for batch in batches]
        counts = torch.stack([micro_batch.counts for micro_batch in micro_batches]).sum(0)
        if self.layout.replicas > 1:
            dist.all_reduce(counts, group=self.groups.replicas)  # replicas: the batch's targets are spread over them
        counts = counts.float()
        weights = torch.where(counts > 0, self.averaged_over / counts, 0.0)
        return [micro_batch._replace(weights=weights) for micro_batch in micro_batches]

    def for_evaluation(self, batches: Iterable[Batch]) -> Iterator[MicroBatch]:
        """Micro-batches of weight 1, one at a time."""
        return (self._micro_batch(batch) for batch in batches)

    def _micro_batch(self, batch: Batch) -> MicroBatch:
        """One batch on the device, cut to this context rank's part of the sequence; every term has weight 1."""
        batch = {key: value.to(self.tp.device, non_blocking=True) for key, value in batch.items()}
        if self.layout.context > 1:
            batch = cast(SequenceObjective, self.objective).part(batch, self.tp.context)
        by_term = self.objective.counts(batch)
        counts = torch.stack([by_term[name].double() for name in self.names])
        return MicroBatch(self.objective.inputs(batch), self.objective.targets(batch),
                          torch.ones_like(counts, dtype=torch.float32), counts)

    # -- the loss -----------------------------------------------------------------------------------------------------

    def of(self, micro_batch: MicroBatch) -> LossFunction:
        """The loss of a micro-batch as a function of the model's outputs."""
        return partial(self.loss, micro_batch=micro_batch)

    def loss(self, outputs: Any, micro_batch: MicroBatch, **options: Any) -> Tensor:
        """The weighted sum of the terms, a scalar; keeps each term's sum and count. `options`: for `losses`."""
        losses = self.objective.losses(outputs, micro_batch.targets, **options)
        weighted = [losses[name] * micro_batch.weights[index] for index, name in enumerate(self.names)]
        self._sums += torch.stack([term.detach() for term in weighted]) / self._divisor
        self._counts += micro_batch.counts
        terms = [weight * term for weight, term in zip(self.objective.terms.values(), weighted, strict=True)]
        return reduce(torch.add, terms)

    # -- the report ---------------------------------------------------------------------------------------------------

    def means(self) -> Losses:
        """Of the training step since `begin_step`. A collective over all ranks."""
        return self._losses(*self._reduced())

    def evaluated(self) -> Losses:
        """Of the evaluation since `begin_evaluation`. A collective over all ranks."""
        sums, counts = self._reduced()
        return self._losses([total / count if count else 0.0 for total, count in zip(sums, counts, strict=True)],
                            counts)

    def _reduced(self) -> tuple[list[float], list[float]]:
        at = self.groups.coordinates
        own = self.tally if at.cp == at.pp == 0 else 0  # the ranks of one data rank have the same; the first gives it
        tally = torch.tensor([own, 0], dtype=torch.float64, device=self.tp.device)
        totals = torch.column_stack([torch.stack([self._sums.double(), self._counts]), tally])
        if self.layout.replicas > 1:
            dist.all_reduce(totals, group=self.groups.replicas)  # replicas: each computed the losses of its share
        if self.layout.pipeline > 1:
            dist.all_reduce(totals, group=self.groups.pipeline)  # pipeline: one of its stages computed the losses
        totals[0, :-1] = totals[0, :-1].float()  # losses are reported in fp32
        (*sums, total), (*counts, _) = totals.tolist()  # one copy from the device
        self.tally = int(total)
        return sums, counts

    def _losses(self, means: list[float], counts: list[float]) -> Losses:
        loss = sum(weight * mean for weight, mean in zip(self.objective.terms.values(), means, strict=True))
        terms = zip(self.names, means, counts, strict=True)
        return Losses(loss, {name: mean if count else None for name, mean, count in terms})
