"""Initial weights as a function of (seed, global parameter name), so that no layout can change them."""

from __future__ import annotations

import hashlib
from dataclasses import KW_ONLY, dataclass, replace

import torch
from torch import Tensor, nn

Std = float | tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Stack:
    """A parameter whose first dim holds equal tensors, each a tensor of its own by global name.

    `module` is the part of the name behind which each one's index stands: of "experts" and 7, `experts.up.weight` is
    `experts.7.up.weight`.
    """

    module: str
    indices: range

    def names(self, name: str) -> tuple[str, ...]:
        """The global names of the tensors that the parameter of this name holds."""
        head, module, tail = name.rpartition(f"{self.module}.")
        return tuple(f"{head}{module}{index}.{tail}" for index in self.indices)


@dataclass(frozen=True)
class ParameterPlan:
    """How a parameter starts and how the tensor axis cuts it: N(mean, std^2); `slice_dim` None means held in full.

    A fused matrix may hold rows of several kinds: `std` is then ((rows, std), ...), repeated until the rows end. With
    `stack` all of that is said of each tensor of the stack.
    """

    mean: float
    std: Std
    slice_dim: int | None
    max_value: float | None = None  # each element is held at or below this after every step
    _: KW_ONLY
    stack: Stack | None = None
    keep_fp32: bool = False  # not cast to the compute type where parallel/precision.py casts
    trainable: bool = True  # else it is filled and stored, and has no gradient, moments or weight decay


def plan_parameter(parameter: nn.Parameter, *, mean: float = 0.0, std: Std = 0.0, slice_dim: int | None = None,
                   no_decay: bool | None = None, max_value: float | None = None, stack: Stack | None = None,
                   keep_fp32: bool = False) -> None:
    """Attach a plan to a parameter; biases and norms (one dim) are kept out of weight decay unless said otherwise."""
    parameter.plan = ParameterPlan(mean, std, slice_dim, max_value=max_value, stack=stack, keep_fp32=keep_fp32)
    # DeepSpeed's bf16 optimizer fails on a tensor rank where no parameter is known to be sliced.
    parameter.tensor_model_parallel = slice_dim is not None
    shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 flattens a parameter as soon as it exists
    dims = len(shape) - (stack is not None)
    parameter.no_decay = dims < 2 if no_decay is None else no_decay


def freeze(parameter: nn.Parameter) -> None:
    """Keep a planned parameter as it is filled: no gradient is computed for it, and no optimizer holds it."""
    parameter.plan = replace(parameter.plan, trainable=False)
    parameter.requires_grad_(False)


def draw(name: str, shape: tuple[int, ...], plan: ParameterPlan, seed: int) -> Tensor:
    """The whole initial tensor, fp32 on the CPU, from SHA-256 of (seed, name): the same bits on every layout."""
    if plan.std == 0.0:
        return torch.full(shape, plan.mean)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    if isinstance(plan.std, tuple):
        cycle = torch.cat([torch.full((rows,), std) for rows, std in plan.std])
        stds = cycle.repeat(shape[0] // len(cycle)).view(-1, *[1] * (len(shape) - 1))
        return plan.mean + torch.empty(shape).normal_(generator=generator) * stds
    return torch.empty(shape).normal_(plan.mean, plan.std, generator=generator)


def slice_of(whole: Tensor, slice_dim: int | None, rank: int, size: int) -> Tensor:
    """The slice of a global tensor that one tensor rank holds."""
    if slice_dim is None or size == 1:
        return whole
    length = whole.shape[slice_dim] // size
    return whole.narrow(slice_dim, rank * length, length)
