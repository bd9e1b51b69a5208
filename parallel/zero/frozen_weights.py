"""Frozen weights: the optimizer does not hold them, but they are filled, stored and compared like any other weight.

What a rank owns of them follows the ZeRO stage, so that filling and storing need no second rule: whole parameters at
stage 0, one piece per replica from stage 1 on. In 16 bits the pieces are fp32 copies in host memory, so that a
checkpoint holds the same bits on every layout; they are read when weights are filled and when a checkpoint is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.parameter_plan import plan_of
from parallel.process_groups import Groups
from parallel.zero.deepspeed_parameters import zero3
from parallel.zero.offload import MappedFiles
from parallel.zero.optimizer_state import (
    Fragment,
    HeldWeight,
    Slot,
    StateView,
    open_optimizer_state,
    whole_weights,
    zero3_weights,
)


class WithFrozenWeights:
    """The state of an optimizer, and beside it the frozen weights of the same stage; a `StateView` as well."""

    def __init__(self, inner: StateView, slots: Sequence[Slot], zero_stage: int, groups: Groups):
        self.inner, self.base = inner, inner.base
        pieces = (WholePiece, SharedPiece, SharedPiece, Zero3Piece)[zero_stage]
        self.pieces = [pieces(slot, groups) for slot in slots]

    def fragments(self, kind: str) -> Iterator[Fragment]:
        yield from self.inner.fragments(kind)
        for piece in self.pieces if kind == "weight" else ():
            yield from piece.slot.fragments(piece.start, piece.master)

    def weights(self) -> Iterator[HeldWeight]:
        yield from self.inner.weights()
        for piece in self.pieces:
            yield from piece.weights()

    def gradients(self) -> Iterator[Fragment]:
        return self.inner.gradients()

    def move_to(self, files: MappedFiles) -> None:
        self.inner.move_to(files)

    def refresh(self) -> None:
        for piece in self.pieces:
            piece.refresh()
        self.inner.refresh()  # afterwards, as stage 3 gathers the small parameters that stay whole, frozen ones too


class WholePiece:
    """Stage 0: the fp32 parameter itself."""

    start = 0

    def __init__(self, slot: Slot, groups: Groups):
        self.slot, self.master = slot, slot.parameter.data.view(-1)

    def weights(self) -> Iterator[HeldWeight]:
        return whole_weights([self.slot])

    def refresh(self) -> None:
        """Nothing to do: the weight is the fragment."""


class SharedPiece:
    """Stages 1 and 2: each rank computes with the whole parameter and owns one of as many pieces as it has holders."""

    def __init__(self, slot: Slot, groups: Groups):
        self.slot = slot
        spread = plan_of(slot.parameter).stack is not None and groups.layout.expert > 1
        self.group = groups.expert_data if spread else groups.replicas  # those who hold the same experts, or weights
        self.size, rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        whole = slot.parameter.data.view(-1)
        self.length = -(-whole.numel() // self.size)
        self.start = min(rank * self.length, whole.numel())
        own = self._own()
        # fp32: a view of the parameter
        self.master = own if own.dtype == torch.float32 else torch.empty(own.shape, dtype=torch.float32)

    def _own(self) -> Tensor:
        whole = self.slot.parameter.data.view(-1)
        return whole[self.start : self.start + self.length]

    def weights(self) -> Iterator[HeldWeight]:
        return whole_weights([self.slot])

    def refresh(self) -> None:
        """Gather the pieces of all holders into the parameter (group: its holders)."""
        whole = self.slot.parameter.data.view(-1)
        own = whole.new_zeros(self.length)
        own[: self.master.numel()].copy_(self.master)
        gathered = own.new_empty(self.size, self.length)
        dist.all_gather(list(gathered), own, group=self.group)
        whole.copy_(gathered.view(-1)[: whole.numel()])


class Zero3Piece:
    """Stage 3: DeepSpeed has cut the parameter over the replicas already."""

    def __init__(self, slot: Slot, groups: Groups):
        self.slot, self.replica, parameter = slot, groups.replica, zero3(slot.parameter)
        held = parameter.partition_numel()
        self.start = min(self.replica * held, parameter.ds_numel)
        self.own = parameter.ds_tensor.view(-1)[: min(held, parameter.ds_numel - self.start)]  # behind it is padding
        is_master = self.own.dtype == torch.float32
        self.master = self.own if is_master else torch.empty(self.own.shape, dtype=torch.float32)

    def weights(self) -> Iterator[HeldWeight]:
        return zero3_weights(self.slot, self.replica)

    def refresh(self) -> None:
        """Copy the fp32 master into DeepSpeed's piece, where it is another tensor."""
        self.own.copy_(self.master)


def open_state(engine, slots: Sequence[Slot], zero_stage: int, groups: Groups) -> StateView:
    """One view of all parameters of this rank: those that the optimizer trains, and those that are frozen."""
    trained = [slot for slot in slots if plan_of(slot.parameter).trainable]
    frozen = [slot for slot in slots if not plan_of(slot.parameter).trainable]
    view = open_optimizer_state(engine, trained, zero_stage, groups.replica)
    return WithFrozenWeights(view, frozen, zero_stage, groups) if frozen else view
