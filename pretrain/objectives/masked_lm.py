"""Masked language model, with next-sentence prediction where the model has a head for it (Devlin et al. 2019, 3.1)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from parallel.chunked_loss import DeferredHead, token_losses
from parallel.tensor_parallel import TensorParallel
from pretrain.models.family import EncoderModel
from pretrain.objectives.objective import ObjectiveConfig


class MaskedLM:
    """The paper's sum of two means: over masked tokens (`masked_lm`) and over pairs of segments (`next_sentence`).

    Batch, with p predictions in a sample: `tokens`, `types` int64 [b, s]; `positions`, `labels` int64 [b, p]; `weights`
    [b, p], 0 where a prediction does not count. `mask` int64 [b, s], 0 on padding, where samples may be padded;
    `not_next` int64 [b, 1] where samples are pairs, 1 for a second segment from elsewhere. A sample without a
    prediction that counts is padding of the batch, and no pair.
    """

    def __init__(self, config: ObjectiveConfig, model: EncoderModel, tp: TensorParallel):
        self.tp = tp
        self.has_pairs = model.next_sentence
        self.terms = {"masked_lm": 1.0, "next_sentence": 1.0} if self.has_pairs else {"masked_lm": 1.0}

    def inputs(self, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """(ids, segment types [b, s], positions to predict [b, p]) and the mask where there is one."""
        mask = (batch["mask"],) if "mask" in batch else ()
        return (batch["tokens"], batch["types"], batch["positions"], *mask)

    def targets(self, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Masked tokens and their weights, [p, b] both; of pairs also [b], whether the second segment is not next."""
        pair = (batch["not_next"][:, 0].contiguous(),) if self.has_pairs else ()
        return batch["labels"].transpose(0, 1).contiguous(), batch["weights"].transpose(0, 1).contiguous(), *pair

    def counts(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Masked tokens that count, and pairs."""
        tokens = {"masked_lm": batch["weights"].sum()}
        return {**tokens, "next_sentence": _is_real(batch["weights"], dim=1).sum()} if self.has_pairs else tokens

    def losses(self, outputs: Tensor | tuple[Tensor, Tensor] | DeferredHead, targets: tuple[Tensor, ...]
               ) -> dict[str, Tensor]:
        """Sums of cross entropies: logits [p, b, v/tp], or (logits, scores [b, 2] of the pair), or the head."""
        labels, weights, *not_next = targets
        losses, *scores = token_losses(outputs, labels, self.tp)
        tokens = {"masked_lm": (losses * weights).sum()}
        if not self.has_pairs:
            return tokens
        pairs = F.cross_entropy(scores[0].float(), not_next[0], reduction="none")
        return {**tokens, "next_sentence": (pairs * _is_real(weights, dim=0)).sum()}


def _is_real(weights: Tensor, dim: int) -> Tensor:
    """[b] whether a sample has a prediction that counts."""
    return weights.sum(dim) > 0
