"""GPT decoders: the fields, their limits and the shapes of their layers; no torch."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

from pydantic import Field

from common.errors import Problem
from parallel.layout import divisors
from parallel.rules.model_traits import ModelTraits
from pretrain.models import mixture
from pretrain.models.family import FamilySpec, TextConfig, heads_divide
from pretrain.models.mixture import MixtureFields
from pretrain.models.shapes import BlockShape, BlockStack, EndShape, norm_parameters


class GPTConfig(MixtureFields, TextConfig):
    """A causal decoder. The defaults are GPT-2's shape of block."""

    family: Literal["gpt"] = Field("gpt", description="the architecture")
    layers: int = Field(ge=1, description="number of transformer blocks")
    hidden: int = Field(ge=1, description="width of the residual stream")
    heads: int = Field(ge=1, description="number of attention heads; hidden / heads is the width of one")
    kv_heads: int | None = Field(
        None, ge=1, description="number of key and value heads, each shared by heads / kv_heads heads; null: as heads"
    )
    ffn: int | None = Field(None, ge=1, description="inner width of the feed-forward part; null: 4 x hidden")
    norm: Literal["layernorm", "rmsnorm"] = Field("layernorm", description="kind of norm")
    norm_position: Literal["pre", "post"] = Field(
        "pre", description="`pre`: before attention and feed-forward, and once at the end; `post`: after each addition"
    )
    norm_epsilon: float = Field(1e-5, gt=0, description="added to the variance in a norm")
    positions: Literal["learned", "rotary", "none"] = Field("learned", description="how a token knows its place")
    rotary_base: float = Field(10000.0, gt=0, description="base of the rotary wavelengths")
    activation: Literal["gelu", "gelu_tanh", "relu", "swiglu"] = Field(
        "gelu", description="non-linearity of the feed-forward part; `swiglu` adds a gate matrix"
    )
    bias: bool = Field(True, description="biases in attention and feed-forward")
    tied_head: bool = Field(True, description="the output head is the token embedding")
    dropout: float = Field(0.0, ge=0, lt=1, description="part of embedding and residual activations set to 0")
    attention_dropout: float = Field(0.0, ge=0, lt=1, description="part of attention weights set to 0")
    init_std: float = Field(0.02, gt=0, description="standard deviation of initial weights")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden // self.heads

    @property
    def num_kv_heads(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def ffn_hidden(self) -> int:
        """Inner width of the feed-forward part."""
        return 4 * self.hidden if self.ffn is None else self.ffn


class GPTSpec(FamilySpec[GPTConfig]):
    """What is known of a GPT from its config."""

    config_class = GPTConfig
    form = "decoder"
    evaluation = "language"
    generation = "continuation"
    objectives = ("causal_lm", "prefix_lm", "fill_in_the_middle")

    def problems(self, config: GPTConfig) -> Iterator[Problem]:
        yield from heads_divide(config.hidden, config.heads)
        if config.hidden % config.heads == 0 and config.positions == "rotary" and config.head_dim % 2:
            yield Problem("model.positions", f"rotary with heads of width {config.head_dim} (hidden / heads)",
                          "an even width: rotary turns pairs of numbers",
                          f"set model.hidden to {config.heads * (config.head_dim + 1)}, or model.positions=learned")
        if config.heads % config.num_kv_heads:
            yield Problem("model.kv_heads",
                          f"{config.heads} heads that share {config.num_kv_heads} key and value heads",
                          "kv_heads that divide heads",
                          f"set model.kv_heads to one of {', '.join(map(str, divisors(config.heads)))}")
        yield from mixture.problems(config, config.layers)

    def traits(self, config: GPTConfig) -> ModelTraits:
        why = "routers of experts look at whole sequences, for their balance and capacity" if config.experts else ""
        return replace(super().traits(config), why_no_context=why)

    def stacks(self, config: GPTConfig) -> tuple[BlockStack, ...]:
        block = BlockShape(
            hidden=config.hidden, heads=config.heads, kv_heads=config.num_kv_heads, head_dim=config.head_dim,
            ffn=config.ffn_hidden, num_tokens=config.sequence_length, norm=config.norm,
            norm_position=config.norm_position, norm_epsilon=config.norm_epsilon, activation=config.activation,
            bias=config.bias, dropout=config.dropout, attention_dropout=config.attention_dropout, std=config.init_std,
            residual_std=BlockShape.scaled_residual(config.init_std, config.layers),
            rotary_base=config.rotary_base if config.positions == "rotary" else None,
        )
        return (BlockStack(name="blocks", num_blocks=config.layers, dense=block, mixture=config.mixture,
                           mixture_every=config.expert_every),)

    def ends(self, config: GPTConfig, num_predictions: int | None = None) -> dict[str, EndShape]:
        hidden, length = config.hidden, config.sequence_length
        learned = config.positions == "learned"
        ends = {"embedding": EndShape(per_token_id=hidden, num_lookups=length * hidden),
                "positions": EndShape(num_parameters=length * hidden if learned else 0)}
        if config.norm_position == "pre":
            ends["final_norm"] = EndShape(num_parameters=norm_parameters(config.norm, hidden))
        predictions = length if num_predictions is None else num_predictions
        ends["head"] = EndShape(per_token_id=0 if config.tied_head else hidden,
                                multiply_adds=predictions * hidden * config.padded_vocab_size)
        return ends


SPEC = GPTSpec()
