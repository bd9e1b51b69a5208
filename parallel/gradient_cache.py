"""Exact gradients, from micro-batches, of a loss that couples all samples of the global batch.

GradCache (Gao et al. 2021, arXiv 2101.06983, section 3): a first pass without gradient collects what the model says of
every sample; the loss and its gradient with respect to that are computed once, over all data ranks; a second pass runs
each micro-batch again and sends its part of that gradient back through the model. One micro-batch a rank needs no first
pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial, reduce
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.loss_terms import LossTerms
from parallel.objective import LossFunction, MicroBatch, ObjectiveTerms
from parallel.process_groups import Groups

Outputs = tuple[Tensor, ...]


class TwoPassObjective(ObjectiveTerms, Protocol):
    """A loss over the whole global batch (`two_pass` is True).

    The model's output is a tuple of real tensors whose first dim is the sample. `losses(outputs, targets, rows)` gives
    the sums over this rank's samples; `rows` brings in those of the other ranks.
    """

    two_pass: bool

    def losses(self, outputs: Outputs, targets: tuple[Tensor, ...], rows: DataRows) -> dict[str, Tensor]: ...


class _Gather(torch.autograd.Function):
    """Concatenation over the data group; backward sums what every rank's loss says of this rank's rows."""

    @staticmethod
    def forward(ctx, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.count = group, rows.shape[0]
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, rows.contiguous(), group=group)  # data group: the samples are spread over it
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        own = gradient.new_empty(ctx.count, *gradient.shape[1:])
        dist.reduce_scatter(own, list(gradient.contiguous().split(ctx.count)), group=ctx.group)  # data group, as above
        return own, None


class DataRows:
    """The samples of all data ranks, in the order of the global batch: each rank holds one block of equal size."""

    def __init__(self, groups: Groups | None = None):
        """With `groups` None this process holds all of them."""
        self.group = groups.data if groups and groups.layout.data > 1 else None
        self.rank = groups.coordinates.dp if groups else 0

    def gather(self, rows: Tensor) -> Tensor:
        """[n, ..] of this rank -> [n x data ranks, ..], with gradient."""
        return rows if self.group is None else _Gather.apply(rows, self.group)

    def first(self, count: int) -> int:
        """The place among all samples of this rank's first, each rank having `count`."""
        return self.rank * count


def concatenated(parts: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Tuples of the micro-batches -> one tuple over all of them."""
    return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))


class GradientCache:
    """What a loss says of every sample's outputs, handed out by micro-batch."""

    def __init__(self, parts: Sequence[Outputs]):
        self.sizes = [len(part[0]) for part in parts]
        self.outputs = tuple(whole.detach().requires_grad_() for whole in concatenated(parts))

    def gradients(self) -> list[Outputs]:
        """By micro-batch, after the loss's backward; zeros for an output that took no part."""
        whole = [torch.zeros_like(o) if o.grad is None else o.grad for o in self.outputs]
        return list(zip(*(gradient.split(self.sizes) for gradient in whole), strict=True))


def surrogate(outputs: Outputs, gradients: Outputs) -> Tensor:
    """A scalar whose gradient with respect to `outputs` is `gradients`."""
    return reduce(torch.add, [(output * gradient).sum() for output, gradient in zip(outputs, gradients, strict=True)])


class TwoPassStep:
    """Forward and backward of one step of a `TwoPassObjective`; there is no pipeline then (a rule)."""

    def __init__(self, forward: Callable[[Any, Callable[[Any], Any]], Any],
                 backward: Callable[[Any, LossFunction], None], terms: LossTerms, groups: Groups):
        """
        Args:
            forward: (inputs, function of the model's outputs) -> its value.
            backward: the same with the function's gradient, added to that of the step.
        """
        self.forward, self.backward, self.terms, self.rows = forward, backward, terms, DataRows(groups)

    def run(self, micro_batches: Sequence[MicroBatch]) -> None:
        """With one micro-batch its loss is the whole one; with more a first pass without gradient comes before."""
        if len(micro_batches) == 1:
            self.backward(micro_batches[0].inputs, self._loss_of(micro_batches))
            return
        states, parts = [], []
        for micro_batch in micro_batches:
            states.append(torch.get_rng_state())  # dropout must drop the same in the second pass
            with torch.no_grad():
                parts.append(self.forward(micro_batch.inputs, tuple))
        cache = GradientCache(parts)
        self._loss_of(micro_batches)(cache.outputs).backward()
        for micro_batch, state, gradients in zip(micro_batches, states, cache.gradients(), strict=True):
            torch.set_rng_state(state)
            self.backward(micro_batch.inputs, partial(surrogate, gradients=gradients))

    def evaluate(self, micro_batches: Iterable[MicroBatch]) -> None:
        """The loss of all micro-batches together; outputs of all of them are kept until then, inputs are not."""
        parts, kept = [], []
        for micro_batch in micro_batches:
            parts.append(self.forward(micro_batch.inputs, tuple))
            kept.append(micro_batch._replace(inputs=None))
        if kept:
            self._loss_of(kept)(concatenated(parts))

    def _loss_of(self, micro_batches: Sequence[MicroBatch]) -> LossFunction:
        """The loss of this rank's samples among those of all data ranks."""
        whole = MicroBatch(None, concatenated([micro_batch.targets for micro_batch in micro_batches]),
                           micro_batches[0].weights,
                           torch.stack([micro_batch.counts for micro_batch in micro_batches]).sum(0))
        return partial(self.terms.loss, micro_batch=whole, rows=self.rows)
