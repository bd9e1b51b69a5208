"""A target text from a source text (Sutskever et al. 2014, eq. 1), whatever noise or cut made the source."""

from __future__ import annotations

from torch import Tensor

from parallel.chunked_loss import DeferredHead, token_losses
from parallel.tensor_parallel import TensorParallel


class Seq2Seq:
    """Batch: `source` int64 [b, s], `tokens` int64 [b, t + 1], `weights` [b, t], 0 where a target does not count.

    `source_mask` int64 [b, s] is there where a source may be filled up; without it attention has nothing to leave out.
    """

    def __init__(self, tp: TensorParallel):
        self.tp = tp

    def inputs(self, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """(source [b, s], decoder inputs [b, t]) and the source's mask where there is one."""
        mask = (batch["source_mask"],) if "source_mask" in batch else ()
        return (batch["source"], batch["tokens"][:, :-1].contiguous(), *mask)

    def targets(self, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Next tokens and their weights, [t, b] both, in the order of the logits."""
        return batch["tokens"][:, 1:].transpose(0, 1).contiguous(), batch["weights"].transpose(0, 1).contiguous()

    def num_targets(self, batch: dict[str, Tensor]) -> Tensor:
        """How many targets count, a scalar."""
        return batch["weights"].sum()

    def loss_sum(self, outputs: Tensor | DeferredHead, targets: tuple[Tensor, ...]) -> Tensor:
        """Sum of cross entropies: logits [t, b, v/tp] or the head, targets as above -> scalar fp32."""
        losses, = token_losses(outputs, targets[0], self.tp)
        return (losses * targets[1]).sum()
