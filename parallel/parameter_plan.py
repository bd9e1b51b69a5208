"""Initial weights as a function of (seed, global name, element), so that no layout can change them.

Each element of a global tensor has a random number of its own (parallel/normal_numbers.py), so a rank draws the
elements that it keeps and no others.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, replace
from math import prod
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn

from common.seeding import derive_key
from parallel.normal_numbers import UniformBits, inverse_normal
from parallel.tensor_slice import SliceRange

CHUNK_ELEMENTS = 1 << 16  # drawn at once: the fp64 arrays of so many stay in a core's cache
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
    `stack` the plan is that of each tensor of the stack.
    """

    mean: float
    std: Std
    slice_dim: int | None
    _: KW_ONLY
    max_value: float | None = None  # each element is held at or below this after every step
    stack: Stack | None = None
    keep_fp32: bool = False  # not cast to the compute type where parallel/precision.py casts
    trainable: bool = True  # else it is filled and stored, and has no gradient, moments or weight decay


class PlannedParameter(Protocol):
    """What `plan_parameter` attaches to a parameter; the last two are for the optimizer and for DeepSpeed."""

    plan: ParameterPlan
    no_decay: bool
    tensor_model_parallel: bool


def planned(parameter: Tensor) -> PlannedParameter:
    """A parameter with what `plan_parameter` has attached to it."""
    return cast(PlannedParameter, parameter)


def plan_of(parameter: Tensor) -> ParameterPlan:
    """The plan of a parameter."""
    return planned(parameter).plan


def plan_parameter(parameter: nn.Parameter, *, mean: float = 0.0, std: Std = 0.0, slice_dim: int | None = None,
                   no_decay: bool | None = None, max_value: float | None = None, stack: Stack | None = None,
                   keep_fp32: bool = False) -> None:
    """Attach a plan to a parameter; biases and norms (one dim) are kept out of weight decay unless said otherwise."""
    attached = planned(parameter)
    attached.plan = ParameterPlan(mean, std, slice_dim, max_value=max_value, stack=stack, keep_fp32=keep_fp32)
    # DeepSpeed's bf16 optimizer fails on a tensor rank where no parameter is known to be sliced.
    attached.tensor_model_parallel = slice_dim is not None
    shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 flattens a parameter as soon as it exists
    dims = len(shape) - (stack is not None)
    attached.no_decay = dims < 2 if no_decay is None else no_decay


def freeze(parameter: nn.Parameter) -> None:
    """Keep a planned parameter as it is filled: no gradient is computed for it, and no optimizer holds it."""
    planned(parameter).plan = replace(plan_of(parameter), trainable=False)
    parameter.requires_grad_(False)


def draw(name: str, shape: tuple[int, ...], plan: ParameterPlan, seed: int) -> Tensor:
    """The whole initial tensor, fp32 on the CPU."""
    return draw_range(SliceRange.whole(name, shape), plan, seed).view(shape)


def draw_range(wanted: SliceRange, plan: ParameterPlan, seed: int) -> Tensor:
    """A part of an initial tensor: fp32 [wanted.count] on the CPU. No other element is drawn.

    Element i of the flattened global tensor is mean + std * z(i), in fp64 and then rounded; z is the stream of standard
    normal numbers whose key is SHA-256 of (seed, name).
    """
    if plan.std == 0.0:
        return torch.full((wanted.count,), plan.mean)
    key = derive_key(seed, wanted.name)
    drawn = np.empty(wanted.count, dtype=np.float32)

    def draw_chunk(chunk: SliceRange) -> None:
        runs, bits = list(chunk.runs()), UniformBits(key)
        numbers = inverse_normal(np.concatenate([bits.read(start, length) for start, length in runs]))
        numbers *= _std_of(runs, wanted.shape, plan.std)
        numbers += plan.mean
        start = chunk.start - wanted.start
        drawn[start : start + chunk.count] = numbers

    chunks = list(wanted.chunks(CHUNK_ELEMENTS))
    num_threads = min(torch.get_num_threads(), len(chunks))
    if num_threads > 1:
        with ThreadPoolExecutor(num_threads) as pool:
            list(pool.map(draw_chunk, chunks))
    else:
        for chunk in chunks:
            draw_chunk(chunk)
    return torch.from_numpy(drawn)


def _std_of(runs: list[tuple[int, int]], shape: tuple[int, ...], std: Std) -> float | np.ndarray:
    """The standard deviation of these elements: one number, or fp64, one each."""
    if not isinstance(std, tuple):
        return std
    cycle = np.concatenate([np.full(rows, value) for rows, value in std])
    rows = np.concatenate([np.arange(start, start + length) for start, length in runs]) // prod(shape[1:])
    return cycle[rows % len(cycle)]


class InitialWeights:
    """The source of a new run: weights drawn by their plans, moments of zero (`parallel.tensor_slice.Source`)."""

    adam_step = 0

    def __init__(self, plans: Mapping[str, ParameterPlan], seed: int):
        """
        Args:
            plans: by global name; a tensor without one (a buffer) starts as zeros.
        """
        self.plans, self.seed = plans, seed

    def read(self, wanted: SliceRange) -> Tensor | None:
        """The initial weights of a range; None for zeros."""
        plan = self.plans.get(wanted.name)
        return draw_range(wanted, plan, self.seed) if plan and wanted.kind == "weight" else None
