"""Next-token prediction (Radford et al. 2018, eq. 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from parallel.chunked_loss import DeferredHead, token_losses
from parallel.context_parallel import ContextParallel
from parallel.tensor_parallel import TensorParallel


class CausalLM:
    """Batch: `tokens` int64 [b, s + 1]; optional `weights` [b, s], 0 where a target does not count, and `prefix` [b],
    the number of first tokens that see each other in both directions.
    """

    def __init__(self, tp: TensorParallel):
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

    def num_targets(self, batch: dict[str, Tensor]) -> Tensor:
        """How many targets count, a scalar."""
        if "weights" in batch:
            return batch["weights"].sum()
        tokens = batch["tokens"]
        return torch.full((), tokens.shape[0] * (tokens.shape[1] - 1), device=tokens.device)

    def loss_sum(self, outputs: Tensor | DeferredHead, targets: tuple[Tensor, ...]) -> Tensor:
        """Sum of cross entropies: logits [s, b, v/t] or the head, targets as above -> scalar fp32."""
        losses, = token_losses(outputs, targets[0], self.tp)
        return (losses * targets[1]).sum() if len(targets) > 1 else losses.sum()
