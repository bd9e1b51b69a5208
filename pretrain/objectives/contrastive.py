"""Losses that pull an image and its caption together and push all others of the global batch apart."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.gradient_cache import DataRows
from parallel.tensor_parallel import TensorParallel
from pretrain.models.family import FamilyConfig
from pretrain.objectives.objective import ObjectiveConfig


class _Pairs:
    """Batch: `pixels` uint8 or real [b, 3, S, S], `tokens` int64 [b, s], `ends` int64 [b] (where the end-of-text
    stands).

    An optional `weights` real [b] is 0 for padding of the batch, which then is no negative of any other pair either.
    """

    two_pass = True

    name: ClassVar[str]  # of the only term

    def __init__(self, config: ObjectiveConfig, model: FamilyConfig, tp: TensorParallel):
        self.tp = tp
        self.terms = {self.name: 1.0}

    def inputs(self, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return batch["pixels"], batch["tokens"], batch["ends"]

    def targets(self, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        if "weights" in batch:
            return (batch["weights"],)
        return (torch.ones(len(batch["tokens"]), device=batch["tokens"].device),)

    def counts(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The pairs that count."""
        return {self.name: self.targets(batch)[0].sum()}


class Contrastive(_Pairs):
    """Symmetric cross entropy over the similarities of all pairs (Radford et al. 2021, figure 3).

    Each rank computes the rows of its own images and of its own captions against everything gathered, so that a rank
    keeps 2 b N similarities instead of N^2.
    """

    name = "contrastive"

    def losses(self, outputs: tuple[Tensor, ...], targets: tuple[Tensor, ...], rows: DataRows) -> dict[str, Tensor]:
        """outputs: (image [n, e] times the scale, text [n, e]); the sum over this rank's n pairs."""
        (image, text), (weights,) = outputs[:2], targets
        others = rows.gather(weights) == 0
        own = torch.arange(rows.first(len(image)), rows.first(len(image)) + len(image), device=image.device)
        total = image.new_zeros(())
        for queries, keys in ((image, text), (text, image)):
            logits = queries @ rows.gather(keys).t()  # [n, N]
            logits = logits.masked_fill(others, torch.finfo(logits.dtype).min)
            total = total + 0.5 * (F.cross_entropy(logits, own, reduction="none") * weights).sum()
        return {self.name: total}


class SigLIP(_Pairs):
    """Every pair is a yes-or-no question of its own (Zhai et al. 2023, section 3.2, eq. 2): no sum over the batch
    inside.

    The model's `logit_bias` is added where it has one.
    """

    name = "siglip"

    def losses(self, outputs: tuple[Tensor, ...], targets: tuple[Tensor, ...], rows: DataRows) -> dict[str, Tensor]:
        """outputs: (image [n, e] times the scale, text [n, e][, bias [n]]); the sum over this rank's n images."""
        (image, text, *bias), (weights,) = outputs, targets
        logits = image @ rows.gather(text).t()  # [n, N]
        if bias:
            logits = logits + bias[0][:, None]
        signs = torch.full_like(logits, -1.0)
        signs[torch.arange(len(image)), torch.arange(len(image)) + rows.first(len(image))] = 1.0
        return {self.name: -(F.logsigmoid(signs * logits) * weights[:, None] * rows.gather(weights)).sum()}
