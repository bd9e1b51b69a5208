"""Randomness inside the step, as a function of (seed, step, place in the layout): nothing to save, nothing to replay.

Ranks of one tensor group draw the same default stream, so dropout on activations they hold in full agrees; dropout on
activations sliced over the tensor axis draws from a stream of its own per tensor rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.seeding import derive
from parallel.process_groups import Groups
from parallel.tensor_parallel import TensorParallel


def seed_step(seed: int, step: int, groups: Groups) -> None:
    """Start the default stream of this step: equal along tp, different along cp, dp and pp."""
    at = groups.coordinates
    torch.manual_seed(derive(seed, "step", step, "cp", at.cp, "dp", at.dp, "pp", at.pp))


def dropout(x: Tensor, probability: float, tp: TensorParallel, *, sliced: bool) -> Tensor:
    """Inverted dropout of x (any shape).

    The seed of the mask is itself drawn from the default CPU stream, which activation recompute restores, so a
    recomputed layer sees the same mask. `sliced` says that tensor ranks hold different parts of x.
    """
    base = int(torch.randint(2**62, ()))
    generator = torch.Generator(device=x.device).manual_seed(derive(base, tp.rank if sliced else 0))
    keep = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - probability, generator=generator)  # kept: a byte each
    return x * keep / (1 - probability)


