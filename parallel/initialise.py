"""Initial weights as a function of (seed, global parameter name), so that no layout can change them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Std = float | tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class ParameterPlan:
    """How a parameter starts and how the tensor axis cuts it: N(mean, std^2); `slice_dim` None means held in full.

    A fused matrix may hold rows of several kinds: `std` is then ((rows, std), ...), repeated until the rows end.
    """

    mean: float
    std: Std
    slice_dim: int | None
    most: float | None = None  # each element is held at or below this after every step


def plan_parameter(parameter: nn.Parameter, *, mean: float = 0.0, std: Std = 0.0, slice_dim: int | None = None,
                   no_decay: bool | None = None, most: float | None = None) -> None:
    """Attach a plan to a parameter; biases and norms (one dim) are kept out of weight decay unless said otherwise."""
    parameter.plan = ParameterPlan(mean, std, slice_dim, most)
    # DeepSpeed's bf16 optimizer fails on a tensor rank where no parameter is known to be sliced.
    parameter.tensor_model_parallel = slice_dim is not None
    dims = len(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 flattens a parameter as soon as it exists
    parameter.no_decay = dims < 2 if no_decay is None else no_decay


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
