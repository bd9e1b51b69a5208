"""Losses of a large vocabulary without all of its logits at once: the head and the loss become one step.

The last layer does not make logits but waits for the targets; called with them it makes the logits of some tokens at a
time, keeps what a softmax needs of them, and makes them again in the backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from torch import Tensor

from parallel.tensor_parallel import TensorParallel


class ChunkedCrossEntropy(Protocol):
    """The loss of each label without all logits at once."""

    def __call__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
        """(hidden [.., h], weight [v/t, h], bias [v/t] or None, labels [..]) -> losses [..] in fp32.

        `hidden` is equal on all tensor ranks and so is its gradient.
        """


@dataclass(frozen=True)
class DeferredHead:
    """A head with its input, to be called with the labels. It gives losses where it would have given logits."""

    layer: Callable
    state: tuple
    cross_entropy: ChunkedCrossEntropy

    def __call__(self, labels: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.layer(*self.state, cross_entropy=partial(self.cross_entropy, labels=labels))


def waiting(layer: Callable, cross_entropy: ChunkedCrossEntropy) -> Callable[..., DeferredHead]:
    """How a layer list calls a head whose logits are never whole."""

    def call(*state) -> DeferredHead:
        return DeferredHead(layer, state, cross_entropy)

    return call


def token_losses(outputs: DeferredHead | Tensor | tuple[Tensor, ...], labels: Tensor, tp: TensorParallel,
                 keep_logits: bool = False) -> tuple[Tensor, ...]:
    """(losses of the labels [s, b] in fp32, further outputs of the head), from logits [s, b, v/t] or a deferred head.

    `keep_logits`: another term of the loss uses the same logits (`TensorParallel.cross_entropy`).
    """
    found = outputs(labels) if isinstance(outputs, DeferredHead) else outputs
    first, *others = found if isinstance(found, tuple) else (found,)
    losses = first if isinstance(outputs, DeferredHead) else tp.cross_entropy(first, labels, keep_logits)
    return (losses, *others)
