"""Where an engine keeps fp32 weights, Adam's moments and gradients, as flat fragments of named parameters.

DeepSpeed lays state out in four ways: a torch optimizer over whole parameters (stage 0), a flat partition per parameter
group (its bf16 optimizer and stages 1 and 2), and partitions inside sub-groups (stage 3). `open_state` hides which.
The rest of the project sees one thing: this rank holds elements [start, start + len) of the flattened local tensor of
parameter `name`. That is what initialisation fills, clipping measures, and checkpoints store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn

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


def whole_weights(slots: list[Slot]) -> Iterator[tuple[str, int | None, Tensor]]:
    """(name, None, the weights as the model computes with them) where no rank holds less than its tensor slice."""
    for slot in slots:
        yield from ((name, None, weights) for name, _, weights in slot.fragments(0, slot.parameter.data.view(-1)))


class WholeState:
    """Stage 0: whole parameters under a torch optimizer."""

    def __init__(self, optimizer: torch.optim.Optimizer, slots: list[Slot]):
        self.base = optimizer
        self.slots = slots

    def fragments(self, kind: str) -> Iterator[Fragment]:
        for slot in self.slots:
            whole = slot.parameter.data if kind == "weight" else _moment(self.base, slot.parameter, kind)
            yield from slot.fragments(0, whole.view(-1))

    def weights(self) -> Iterator[tuple[str, int | None, Tensor]]:
        return whole_weights(self.slots)

    def gradients(self) -> Iterator[Fragment]:
        for slot in self.slots:
            if slot.parameter.grad is not None:
                yield from slot.fragments(0, slot.parameter.grad.view(-1))

    def refresh(self) -> None:
        """Nothing to do: the weights are the fragments."""


class PartitionedState:
    """DeepSpeed's bf16 optimizer and ZeRO 1 and 2: one flat fp32 partition per parameter group."""

    def __init__(self, optimizer, slots: list[Slot]):
        self.optimizer = optimizer
        self.base = optimizer.optimizer
        self.all_slots = slots
        self.slots = [slot for slot in slots if slot.parameter._hp_mapping is not None]

    def fragments(self, kind: str) -> Iterator[Fragment]:
        for slot in self.slots:
            mapping = slot.parameter._hp_mapping
            flat = self.base.param_groups[mapping.param_group_index]["params"][0]
            source = flat.data if kind == "weight" else _moment(self.base, flat, kind)
            address = mapping.get_hp_fragment_address()
            piece = source.narrow(0, address.start, address.numel)
            yield from slot.fragments(mapping.lp_fragment_address.start, piece)

    def weights(self) -> Iterator[tuple[str, int | None, Tensor]]:
        return whole_weights(self.all_slots)

    def gradients(self) -> Iterator[Fragment]:
        whole = getattr(self.optimizer, "fp32_groups_gradient_flat_partition", None)  # the bf16 optimizer's
        for slot in self.slots:
            mapping = slot.parameter._hp_mapping
            address = mapping.get_hp_fragment_address()
            if whole is not None:
                gradient = whole[mapping.param_group_index].narrow(0, address.start, address.numel)
            else:
                gradient = mapping.get_lp_grad_fragment(slot.parameter._index_in_param_group).view(-1)
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

    def weights(self) -> Iterator[tuple[str, int | None, Tensor]]:
        """This rank's pieces, and whole what DeepSpeed keeps gathered."""
        for slot in self.by_parameter.values():
            parameter = slot.parameter
            if parameter.ds_tensor.status.name == "AVAILABLE":  # not while it lies on a disc
                held = parameter.partition_numel()
                count = max(0, min(held, parameter.ds_numel - self.replica * held))  # behind it lies padding
                start, piece = self.replica * held, parameter.ds_tensor.view(-1)[:count]
                yield from ((name, self.replica, weights) for name, _, weights in slot.fragments(start, piece))
            if parameter.ds_persist and parameter.ds_status.name == "AVAILABLE":
                yield from whole_weights([slot])

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


def open_state(engine, slots: list[Slot], zero_stage: int, replica: int):
    """The view that fits the optimizer DeepSpeed chose."""
    if zero_stage == 0:
        return WholeState(engine.optimizer, slots)
    if zero_stage == 3:
        return Zero3State(engine.optimizer, slots, replica)
    return PartitionedState(engine.optimizer, slots)
