"""Mixtures of experts as fields of `model` that families share, and the limits of these fields; no torch."""

from collections.abc import Iterator
from typing import Literal

from pydantic import BaseModel, Field

from common.errors import Problem
from parallel.config import STRICT
from pretrain.models.shapes import MixtureShape

# Fields that say nothing without experts, and whose defaults say so.
DEPENDENT = ("expert_ffn", "shared_expert_ffn", "capacity_factor", "bias_rate")


class MixtureFields(BaseModel):
    """Fields of `model` with which feed-forward parts become mixtures of experts."""

    model_config = STRICT

    experts: int = Field(0, ge=0, description="experts in each mixture; 0: every layer is dense")
    top_k: int = Field(1, ge=1, description="experts that a token is sent to")
    expert_every: int = Field(
        1, ge=1, description="every n-th block has a mixture (of each side, where there are two), the others stay dense"
    )
    expert_ffn: int | None = Field(None, ge=1, description="inner width of one expert; null: as the dense one")
    shared_expert_ffn: int | None = Field(
        None, ge=1, description="inner width of an expert that every token meets beside its own; null: there is none"
    )
    router: Literal["softmax_top_k", "top_k_softmax"] = Field(
        "softmax_top_k", description="weight of an expert: `softmax_top_k` its probability among all (Switch), "
        "`top_k_softmax` its probability among those chosen (GShard, Mixtral)"
    )
    capacity_factor: float | None = Field(
        None, gt=0, description="an expert takes at most this times an even share of a sequence's choices in training, "
        "and what is too much is dropped; null: nothing is dropped"
    )
    balance_loss: float = Field(0.01, ge=0, description="coefficient of the load-balance loss, taken per sequence")
    z_loss: float = Field(0.0, ge=0, description="coefficient of the squared log-sum-exp of the router's logits")
    bias_rate: float = Field(
        0.0, ge=0, description="how far the selection bias of an expert moves after a step, against its load; 0: none"
    )

    @property
    def mixture(self) -> MixtureShape | None:
        """The shape of a mixture; None where every layer is dense."""
        if not self.experts:
            return None
        return MixtureShape(
            experts=self.experts, top_k=self.top_k, ffn=self.expert_width, shared_ffn=self.shared_expert_ffn or 0,
            renormalised=self.router == "top_k_softmax", capacity_factor=self.capacity_factor,
            balance_loss=self.balance_loss, z_loss=self.z_loss, bias_rate=self.bias_rate)

    @property
    def expert_width(self) -> int:
        """Inner width of one expert; 0 without experts."""
        if not self.experts:
            return 0
        return self.ffn_hidden if self.expert_ffn is None else self.expert_ffn

    @property
    def ffn_hidden(self) -> int:
        """Inner width of a dense feed-forward part; the family's config says how it follows from its fields."""
        raise NotImplementedError


def problems(config: MixtureFields, *sides: int) -> Iterator[Problem]:
    """What does not fit together, as (where, asked, possible, change). `sides`: number of blocks of each side."""
    if not config.experts:
        told = [name for name in DEPENDENT if getattr(config, name) != MixtureFields.model_fields[name].default]
        if told:
            yield Problem(f"model.{told[0]}", f"{', '.join(told)} without experts",
                          "these with model.experts of at least 1",
                          f"set model.experts, or leave {', '.join(told)} out")
        return
    if config.top_k > config.experts:
        yield Problem("model.top_k", f"{config.top_k} experts for each token, of {config.experts}",
                      f"1 to {config.experts}: a token meets an expert once",
                      f"set model.top_k to {config.experts} or less, or model.experts to {config.top_k} or more")
    if config.expert_every > min(sides):
        yield Problem("model.expert_every", f"a mixture in every {config.expert_every}th block, of {min(sides)}",
                      f"1 to {min(sides)}", f"set model.expert_every to {min(sides)} or less, or model.experts=0")
    if config.router == "top_k_softmax" and config.top_k == 1:
        yield Problem("model.router",
                      "top_k_softmax with top_k=1: the weight is always 1, and the router learns nothing from "
                      "the loss", "top_k_softmax with top_k of at least 2, or softmax_top_k",
                      "set model.router=softmax_top_k, or model.top_k=2")
