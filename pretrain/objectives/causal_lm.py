"""Next-token prediction (Radford et al. 2018, eq. 1)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from parallel.chunked_loss import DeferredHead, token_losses
from parallel.context_parallel import ContextParallel
from parallel.tensor_parallel import TensorParallel
from pretrain.models.family import FamilyConfig
from pretrain.objectives.objective import ObjectiveConfig


class CausalLM:
    """Batch: `tokens` int64 [b, s + 1]; optional `weights` [b, s], 0 where a target does not count, and `prefix` [b],
    the number of first tokens that see each other in both directions.
    """

    terms: ClassVar = {"next_token": 1.0}

    def __init__(self, config: ObjectiveConfig, model: FamilyConfig, tp: TensorParallel):
        self.tp = tp

    def part(self, batch: dict[str, Tensor], context: ContextParallel) -> dict[str, Tensor]:
        """The batch of this context rank's part of the sequence; its last target is the next part's first token."""
        own = {**batch, "tokens": context.part(batch["tokens"], overlap=1)}
        return {**own, "weights": context.part(batch["weights"])} if "weights" in batch else own

    def inputs(self, batch: dict[str, Tensor]) -> Tensor | tuple[Tensor, Tensor]:
        """ids [b, s], every token but the last; or (ids, prefix)."""
        ids = batch["tokens"][:, :-1].contiguous()
        return (ids, batch["prefix"]) if "prefix" in batch else ids

    def targets(self, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Next tokens [s, b], in the order of the logits, and their weights [s, b] where the batch has them."""
        tokens = batch["tokens"][:, 1:].transpose(0, 1).contiguous()
        if "weights" in batch:
            return tokens, batch["weights"].transpose(0, 1).contiguous()
        return (tokens,)

    def counts(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The targets that count."""
        if "weights" in batch:
            return {"next_token": batch["weights"].sum()}
        tokens = batch["tokens"]
        return {"next_token": torch.full((), tokens.shape[0] * (tokens.shape[1] - 1), device=tokens.device)}

    def losses(self, outputs: Tensor | DeferredHead, targets: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Sum of cross entropies: logits [s, b, v/t] or the head, targets as above."""
        losses, = token_losses(outputs, targets[0], self.tp)
        return {"next_token": (losses * targets[1]).sum() if len(targets) > 1 else losses.sum()}
