"""Facts of a mixture of experts that families share: the fields, their limits, and what they count (no torch)."""

from collections.abc import Iterator
from typing import Literal

from pydantic import BaseModel, Field

from common.errors import Problem
from parallel.config import STRICT

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

    def is_mixture(self, index: int) -> bool:
        """Whether the block of this index (of one side) has a mixture: the last of every `expert_every` blocks."""
        return self.experts > 0 and (index + 1) % self.expert_every == 0

    def num_mixtures(self, layers: int) -> int:
        """How many of so many blocks have a mixture."""
        return layers // self.expert_every if self.experts else 0

    @property
    def expert_width(self) -> int:
        """Inner width of one expert; 0 without experts."""
        if not self.experts:
            return 0
        return self.ffn_hidden if self.expert_ffn is None else self.expert_ffn

    @property
    def shared_width(self) -> int:
        """Inner width of the shared expert; 0 where there is none."""
        return self.shared_expert_ffn or 0 if self.experts else 0


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
        yield Problem("model.router", "top_k_softmax with top_k=1: the weight is always 1, and the router learns "
                      "nothing from the loss", "top_k_softmax with top_k of at least 2, or softmax_top_k",
                      "set model.router=softmax_top_k, or model.top_k=2")


def added_parameters(config: MixtureFields, layers: int, gated: bool, bias: bool) -> int:
    """Parameters that the mixtures of so many blocks have beyond dense feed-forward parts."""
    return _beyond_dense(config, layers, gated, bias, config.experts)


def added_active_parameters(config: MixtureFields, layers: int, gated: bool, bias: bool) -> int:
    """The same, counting only the experts that one token meets."""
    return _beyond_dense(config, layers, gated, bias, config.top_k)


def _beyond_dense(config: MixtureFields, layers: int, gated: bool, bias: bool, num_experts: int) -> int:
    def feed_forward(width: int) -> int:
        matrices = 3 if gated else 2
        return matrices * config.hidden * width + ((matrices - 1) * width + config.hidden if bias else 0)

    shared = feed_forward(config.shared_width) if config.shared_width else 0
    mixture = config.experts * config.hidden + shared + num_experts * feed_forward(config.expert_width)
    return config.num_mixtures(layers) * (mixture - feed_forward(config.ffn_hidden))
