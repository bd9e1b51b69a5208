"""Masked language model with an optional judgement of the pair (Devlin et al. 2019, section 3.1)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from parallel.chunked_loss import DeferredHead, token_losses
from parallel.tensor_parallel import TensorParallel


class MaskedLM:
    """Batch, with p predictions in a sample: `tokens`, `types` int64 [b, s]; `positions`, `labels` int64 [b, p];
    `weights` [b, p]. `mask` int64 [b, s] where samples may be filled up; `not_next` int64 [b, 1] where they are pairs.
    """

    def __init__(self, tp: TensorParallel):
        self.tp = tp

    def inputs(self, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """(ids, segment types [b, s], positions to predict [b, p]) and the mask where there is one."""
        mask = (batch["mask"],) if "mask" in batch else ()
        return (batch["tokens"], batch["types"], batch["positions"], *mask)

    def targets(self, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Hidden tokens and their weights, [p, b] both, and [b] whether the second segment is a strange one."""
        pair = (batch["not_next"][:, 0].contiguous(),) if "not_next" in batch else ()
        return batch["labels"].transpose(0, 1).contiguous(), batch["weights"].transpose(0, 1).contiguous(), *pair

    def num_targets(self, batch: dict[str, Tensor]) -> Tensor:
        """How many hidden tokens count, a scalar."""
        return batch["weights"].sum()

    def loss_sum(self, outputs: Tensor | tuple[Tensor, Tensor] | DeferredHead, targets: tuple[Tensor, ...]) -> Tensor:
        """Sum over hidden tokens, scalar fp32: logits [p, b, v/tp], or (logits, scores [b, 2] of the pair), or the
        head.

        A pair's loss counts as often as its sample has hidden tokens, so that the mean over hidden tokens is the
        paper's sum of the two means.
        """
        labels, weights, *pair = targets
        losses, *scores = token_losses(outputs, labels, self.tp)
        loss = (losses * weights).sum()
        if not scores:
            return loss
        return loss + (F.cross_entropy(scores[0].float(), pair[0], reduction="none") * weights.sum(0)).sum()
