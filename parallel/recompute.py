"""Recompute of activations in the backward pass (Chen et al. 2016, arXiv 1604.06174).

`full` keeps only a block's input. `selective` (Korthikanti et al. 2022, arXiv 2205.05198, section 5) keeps what the
matrix products give and computes again what is cheap and large: the attention between projection and projection, and
the activation function. Neither touches a weight or a collective again that `selective` keeps, and each computes with
the same inputs and the same masks of dropout, so loss and gradient are equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def recomputed(layer: nn.Module | Callable) -> Callable:
    """The layer, keeping only its input for the backward pass.

    The non-reentrant form: the reentrant one loses the gradient when a stage's first input is integer, and it cannot
    see parameters that take part through a closure.
    """

    def call(*state):
        return checkpoint(layer, *state, use_reentrant=False)

    return call


class Recomputable(nn.Module):
    """A layer that names its cheap parts, functions without weights and without collectives."""

    selective = False

    def recompute(self, function: Callable[..., Tensor], *inputs) -> Tensor:
        """function(*inputs); under selective recompute only the inputs and the output live until the backward."""
        return checkpoint(function, *inputs, use_reentrant=False) if self._recomputes() else function(*inputs)

    def recompute_before(self, product: Callable[[Tensor], Tensor], function: Callable[..., Tensor], *inputs) -> Tensor:
        """product(function(*inputs)); under selective recompute only the inputs live until the backward.

        What `product` keeps for its backward is its input's storage, which is emptied once it has been read and filled
        again when the gradient of the product arrives. That holds whatever the product saves, and whoever gathers its
        weights.
        """
        if not self._recomputes():
            return product(function(*inputs))
        between = self.recompute(function, *inputs)
        result = product(between)
        if not result.requires_grad:  # frozen, and so is everything before: nothing is kept for a backward
            return result
        storage, again = between.untyped_storage(), tuple(tensor.detach() for tensor in inputs)
        num_bytes = storage.nbytes()

        def fill(gradient: Tensor) -> None:
            storage.resize_(num_bytes)
            with torch.no_grad():
                storage.copy_(function(*again).untyped_storage())

        def empty(gradient: Tensor) -> None:
            storage.resize_(0)

        storage.resize_(0)
        result.register_hook(fill)
        if between.requires_grad:  # else only the weight of the product is trained, and the graph ends here
            between.register_hook(empty)
        return result

    def _recomputes(self) -> bool:
        return self.selective and torch.is_grad_enabled()


def recompute_selectively(layer: nn.Module) -> None:
    """Have the layer's parts compute again what each of them says is cheap."""
    for part in layer.modules():
        if isinstance(part, Recomputable):
            part.selective = True
