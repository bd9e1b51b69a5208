"""Recompute of activations in the backward pass (Chen et al. 2016, arXiv 1604.06174).

`full` keeps only a block's input. `selective` (Korthikanti et al. 2022, arXiv 2205.05198, section 5) keeps the outputs
of matrix products and recomputes large tensors that cost little: attention between the two projections, and the
activation function. `selective` runs no product with a weight and no collective a second time. Either form recomputes
with the same inputs and the same dropout masks, so loss and gradient are equal bit for bit.
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
    """A layer that marks its cheap parts: functions without weights and without collectives."""

    selective = False

    def recompute(self, function: Callable[..., Tensor], *inputs) -> Tensor:
        """function(*inputs); under selective recompute only the inputs and the output live until the backward."""
        return checkpoint(function, *inputs, use_reentrant=False) if self._recomputes() else function(*inputs)

    def recompute_before(self, product: Callable[[Tensor], Tensor], function: Callable[..., Tensor], *inputs) -> Tensor:
        """product(function(*inputs)); under selective recompute only the inputs live until the backward.

        The product saves its input, `between`, for its backward. The storage of that tensor is emptied after the
        forward and filled again before the product's backward reads it:

            forward     inputs --function--> between --product--> result
                                                |
                                          storage emptied
            backward    (1) gradient of result arrives      hook `fill`: between = function(inputs) again
                        (2) product's backward              reads between
                        (3) gradient of between arrives     hook `empty`: storage emptied
                        (4) function's backward             recomputes from the inputs itself

        So it does not matter which kernel the product is, nor that ZeRO-3 has released its weights meanwhile.

        It can go when torch offers one of two things: hooks on saved tensors for chosen tensors only
        (`torch.autograd.graph.saved_tensors_hooks` catches all that a region saves, among them ZeRO-3's weights, which
        the hooks would keep alive), or selective checkpointing (`create_selective_checkpoint_contexts`) that recomputes
        a product's input without entering the product's module a second time.
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
    """Turn selective recompute on in every part of the layer that has some."""
    for part in layer.modules():
        if isinstance(part, Recomputable):
            part.selective = True
