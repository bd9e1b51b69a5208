"""Recompute of activations in the backward pass (Chen et al. 2016, arXiv 1604.06174)."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.utils.checkpoint import checkpoint


def recomputed(layer: nn.Module | Callable) -> Callable:
    """The layer, keeping only its input for the backward pass.

    The non-reentrant form: the reentrant one loses the gradient when a stage's first input is integer, and it cannot
    see parameters that take part through a closure.
    """

    def call(*state):
        return checkpoint(layer, *state, use_reentrant=False)

    return call
