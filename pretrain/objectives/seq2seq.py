"""Predicts a target text from a source text (Sutskever et al. 2014, eq. 1)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from parallel.chunked_loss import DeferredHead, token_losses
from parallel.tensor_parallel import TensorParallel
from pretrain.models.family import FamilyConfig
from pretrain.objectives.objective import ObjectiveConfig


class Seq2Seq:
    """Batch: `source` int64 [b, s], `tokens` int64 [b, t + 1], `weights` [b, t], 0 where a target does not count.

    `source_mask` int64 [b, s] is 0 on padding; a batch whose sources are never padded has none.
    """

    terms: ClassVar = {"next_token": 1.0}

    def __init__(self, config: ObjectiveConfig, model: FamilyConfig, tp: TensorParallel):
        self.tp = tp

    def inputs(self, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """(source [b, s], decoder inputs [b, t]) and the source's mask where there is one."""
        mask = (batch["source_mask"],) if "source_mask" in batch else ()
        return (batch["source"], batch["tokens"][:, :-1].contiguous(), *mask)

    def targets(self, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Next tokens and their weights, [t, b] both, in the order of the logits."""
        return batch["tokens"][:, 1:].transpose(0, 1).contiguous(), batch["weights"].transpose(0, 1).contiguous()

    def counts(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The targets that count."""
        return {"next_token": batch["weights"].sum()}

    def losses(self, outputs: Tensor | DeferredHead, targets: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Sum of cross entropies: logits [t, b, v/tp] or the head, targets as above."""
        losses, = token_losses(outputs, targets[0], self.tp)
        return {"next_token": (losses * targets[1]).sum()}
