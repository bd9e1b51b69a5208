"""Where an engine keeps fp32 weights, Adam's moments and gradients, as flat fragments of named parameters.

DeepSpeed lays state out in four ways: a torch optimizer over whole parameters (stage 0), a flat partition per parameter
group (its bf16 optimizer and stages 1 and 2), and partitions inside sub-groups (stage 3). `StateView` hides which.
The rest of the project sees one thing: this rank holds elements [start, start + len) of the flattened local tensor of
parameter `name`. That is what initialisation fills, clipping measures, and checkpoints store. Frozen parameters, which
no optimizer holds, come in by parallel/zero/frozen_weights.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from parallel.zero.deepspeed_parameters import mapped, zero3
from parallel.zero.offload import MappedFiles

KINDS = ("weight", "exp_avg", "exp_avg_sq")


class Fragment(NamedTuple):
    """A flat view of one rank's piece of a parameter (or of its moments or gradient): writing to it changes it."""

    name: str
    start: int
    tensor: Tensor


@dataclass(frozen=True)
class Slot:
    """A parameter of this rank: its local shape (after the tensor axis, before ZeRO) and how it was planned.

    It holds one global tensor, or a stack of several of this shape, one behind the other.
    """

    names: tuple[str, ...]
    parameter: nn.Parameter
    shape: tuple[int, ...]
    slice_dim: int | None

    def fragments(self, start: int, tensor: Tensor) -> Iterator[Fragment]:
        """Elements [start, start + len) of the flattened parameter as fragments of the global tensors in it."""
        size, end = prod(self.shape), start + tensor.numel()
        for index, name in enumerate(self.names):
            begin, stop = max(start, index * size), min(end, (index + 1) * size)
            if begin < stop:
                yield Fragment(name, begin - index * size, tensor[begin - start : stop - start])


class HeldWeight(NamedTuple):
    """A weight, or a piece of one, in the type that the model computes with. `replica` is None where every replica
    holds it whole, else the replica (of the cp x dp ranks) whose piece it is.
    """

    name: str
    replica: int | None
    tensor: Tensor


class StateView(Protocol):
    """One view of the state that DeepSpeed's optimizers lay out in different ways.

    All views yield tensors of this rank by global name. `base` is the optimizer that steps: torch's AdamW or
    DeepSpeed's for the CPU.
    """

    base: torch.optim.Optimizer

    def fragments(self, kind: str) -> Iterator[Fragment]:
        """What this rank owns of a kind of KINDS, in fp32. A fragment is a view: who writes to it calls `refresh`."""

    def weights(self) -> Iterator[HeldWeight]:
        """The weights that the model computes with, in its compute type, as far as this rank holds them."""

    def gradients(self) -> Iterator[Fragment]:
        """Between the backward and the optimizer's step: what this rank holds of the reduced gradients, as views."""

    def move_to(self, files: MappedFiles) -> None:
        """Keep master weights and moments in files, from the first step on."""

    def refresh(self) -> None:
        """Bring changed fragments of weights into the model, on every rank that computes with them. A collective."""


def whole_weights(slots: Iterable[Slot]) -> Iterator[HeldWeight]:
    """The weights as the model computes with them, where no rank holds less than its tensor slice."""
    for slot in slots:
        yield from (HeldWeight(name, None, weights)
                    for name, _, weights in slot.fragments(0, slot.parameter.data.view(-1)))


def zero3_weights(slot: Slot, replica: int) -> Iterator[HeldWeight]:
    """This replica's piece of a parameter, and all of it where DeepSpeed keeps it gathered."""
    parameter = zero3(slot.parameter)
    if parameter.ds_tensor.status.name == "AVAILABLE":  # not while it lies on a disk
        held = parameter.partition_numel()
        count = max(0, min(held, parameter.ds_numel - replica * held))  # behind it lies padding
        start, piece = replica * held, parameter.ds_tensor.view(-1)[:count]
        yield from (HeldWeight(name, replica, weights) for name, _, weights in slot.fragments(start, piece))
    if parameter.ds_persist and parameter.ds_status.name == "AVAILABLE":
        yield from whole_weights([slot])


class WholeState:
    """Stage 0: whole parameters under a torch optimizer."""

    def __init__(self, optimizer: torch.optim.Optimizer, slots: list[Slot]):
        self.base = optimizer
        self.slots = slots

    def fragments(self, kind: str) -> Iterator[Fragment]:
        for slot in self.slots:
            whole = slot.parameter.data if kind == "weight" else _moment(self.base, slot.parameter, kind)
            yield from slot.fragments(0, whole.view(-1))

    def weights(self) -> Iterator[HeldWeight]:
        return whole_weights(self.slots)

    def gradients(self) -> Iterator[Fragment]:
        for slot in self.slots:
            if slot.parameter.grad is not None:
                yield from slot.fragments(0, slot.parameter.grad.view(-1))

    def move_to(self, files: MappedFiles) -> None:
        """Offload needs ZeRO 1 to 3 (a rule of parallel/rules/table.py)."""
        raise NotImplementedError("at stage 0 the optimizer's state stays in memory")

    def refresh(self) -> None:
        """Nothing to do: the weights are the fragments."""


class PartitionedState:
    """DeepSpeed's bf16 optimizer and ZeRO 1 and 2: one flat fp32 partition per parameter group."""

    def __init__(self, optimizer, slots: list[Slot]):
        self.optimizer = optimizer
        self.base = optimizer.optimizer
        self.all_slots = slots
        # DeepSpeed maps a parameter to this rank's partition where the two overlap
        self.slots = [slot for slot in slots if mapped(slot.parameter)._hp_mapping is not None]

    def fragments(self, kind: str) -> Iterator[Fragment]:
        for slot in self.slots:
            mapping = mapped(slot.parameter)._hp_mapping
            flat = self.base.param_groups[mapping.param_group_index]["params"][0]
            source = flat.data if kind == "weight" else _moment(self.base, flat, kind)
            address = mapping.get_hp_fragment_address()
            piece = source.narrow(0, address.start, address.numel)
            yield from slot.fragments(mapping.lp_fragment_address.start, piece)

    def weights(self) -> Iterator[HeldWeight]:
        return whole_weights(self.all_slots)

    def gradients(self) -> Iterator[Fragment]:
        whole = getattr(self.optimizer, "fp32_groups_gradient_flat_partition", None)  # the bf16 optimizer's
        for slot in self.slots:
            mapping = mapped(slot.parameter)._hp_mapping
            address = mapping.get_hp_fragment_address()
            if whole is not None:
                gradient = whole[mapping.param_group_index].narrow(0, address.start, address.numel)
            else:
                gradient = mapping.get_lp_grad_fragment(mapped(slot.parameter)._index_in_param_group).view(-1)
            yield from slot.fragments(mapping.lp_fragment_address.start, gradient)

    def move_to(self, files: MappedFiles) -> None:
        """Keep the fp32 partitions and Adam's moments in files."""
        _keep_in(files, self.base, [flat for group in self.base.param_groups for flat in group["params"]])
        self.optimizer._link_all_hp_params()  # DeepSpeed's own views were of the partitions in memory

    def refresh(self) -> None:
        """Copy the fp32 partitions into the model's weights and gather the others' (replicas)."""
        self.optimizer.update_lp_params()


class Zero3State:
    """ZeRO 3: each parameter is cut over the replicas, and the pieces lie flat in sub-groups."""

    def __init__(self, optimizer, slots: list[Slot], replica: int):
        self.optimizer = optimizer
        self.base = optimizer.optimizer
        self.replica = replica
        self.by_parameter = {id(slot.parameter): slot for slot in slots}

    def _places(self) -> Iterator[tuple[Slot, int, int, int, int, int]]:
        """(slot, sub-group, index in it, offset in its flat partition, first element, number of elements)."""
        for group, parameters in enumerate(self.optimizer.fp16_groups):
            offset = 0
            for index, parameter in enumerate(parameters):
                held = parameter.partition_numel()
                start = self.replica * held
                count = max(0, min(held, parameter.ds_numel - start))  # the last ranks hold padding
                yield self.by_parameter[id(parameter)], group, index, offset, start, count
                offset += held

    def fragments(self, kind: str) -> Iterator[Fragment]:
        for slot, group, _, offset, start, count in self._places():
            flat = self.optimizer.fp32_partitioned_groups_flat[group]
            source = flat.data if kind == "weight" else _moment(self.base, flat, kind)
            if count:
                yield from slot.fragments(start, source.narrow(0, offset, count))

    def weights(self) -> Iterator[HeldWeight]:
        for slot in self.by_parameter.values():
            yield from zero3_weights(slot, self.replica)

    def gradients(self) -> Iterator[Fragment]:
        for slot, group, index, offset, start, count in self._places():
            if not count:
                continue
            if self.optimizer.offload_optimizer:  # in host memory, beside the weights
                gradient = self.optimizer.fp32_partitioned_groups_flat[group].grad.narrow(0, offset, count)
            else:
                gradient = self.optimizer.averaged_gradients[group][index].view(-1)[:count]
            yield from slot.fragments(start, gradient)

    def move_to(self, files: MappedFiles) -> None:
        """Keep the fp32 partitions and Adam's moments in files."""
        _keep_in(files, self.base, self.optimizer.fp32_partitioned_groups_flat)

    def refresh(self) -> None:
        """Copy the fp32 partitions into the model's; small parameters that stay gathered are gathered anew."""
        for group in range(len(self.optimizer.fp16_groups)):
            self.optimizer._reassign_or_swap_out_partitioned_parameters(group)
        kept = self.optimizer.persistent_parameters
        if kept:
            kept[0].partition(kept)
            kept[0].all_gather(kept)


def _moment(optimizer: torch.optim.Optimizer, parameter: Tensor, kind: str) -> Tensor:
    """AdamW's moment of a tensor, made (zero, step 0) when no step has been taken yet."""
    if not optimizer.state[parameter]:
        _begin(optimizer, parameter, torch.zeros_like)
    return optimizer.state[parameter][kind]


def _begin(optimizer: torch.optim.Optimizer, parameter: Tensor, zeros_like: Callable[[Tensor], Tensor]) -> None:
    """Adam's state of a tensor before its first step."""
    optimizer.state[parameter] = {"step": _step_count(optimizer, parameter, 0),
                                  **{kind: zeros_like(parameter) for kind in KINDS[1:]}}


@torch.no_grad()
def _keep_in(files: MappedFiles, optimizer: torch.optim.Optimizer, flats: list[nn.Parameter]) -> None:
    """Move master weights into files, and begin the moments there."""
    for flat in flats:
        flat.data = files.zeros_like(flat).copy_(flat)
        _begin(optimizer, flat, files.zeros_like)


def set_adam_step(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Set AdamW's own step count, which its bias correction uses, on every tensor it holds."""
    for parameter, state in optimizer.state.items():
        state["step"] = _step_count(optimizer, parameter, step)


def _step_count(optimizer: torch.optim.Optimizer, parameter: Tensor, step: int) -> Tensor | int:
    """torch's AdamW counts in a tensor, DeepSpeed's for the CPU in a plain number."""
    if isinstance(optimizer, torch.optim.AdamW):
        return torch.full((), step, dtype=torch.float32, device=parameter.device)
    return step


def open_optimizer_state(engine, slots: list[Slot], zero_stage: int, replica: int) -> StateView:
    """The view that fits the optimizer DeepSpeed chose; `slots` are those that it trains."""
    if zero_stage == 0:
        return WholeState(engine.optimizer, slots)
    if zero_stage == 3:
        return Zero3State(engine.optimizer, slots, replica)
    return PartitionedState(engine.optimizer, slots)
