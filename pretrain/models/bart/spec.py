"""BART (Lewis et al. 2020): fields, limits and shapes of layers; no torch."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from common.errors import Problem
from pretrain.models.encoder_decoder import EncoderDecoderConfig, EncoderDecoderSpec
from pretrain.models.family import heads_divide
from pretrain.models.shapes import BlockShape, EndShape, norm_parameters

NUM_UNUSED_POSITIONS = 2  # the published tables begin with two rows that no token uses


class BARTConfig(EncoderDecoderConfig):
    """An encoder-decoder with post-norm blocks, learned positions and one token table for everything."""

    family: Literal["bart"] = Field("bart", description="the architecture")
    max_positions: int | None = Field(
        None, ge=1, description="length of the tables of positions; null: the longer of source and target"
    )
    activation: Literal["gelu", "gelu_tanh", "relu"] = Field(
        "gelu", description="non-linearity of the feed-forward part"
    )
    norm_epsilon: float = Field(1e-5, gt=0, description="added to the variance in a norm")
    init_std: float = Field(0.02, gt=0, description="standard deviation of initial weights")

    @property
    def num_positions(self) -> int:
        """Rows of a table of positions as built."""
        longest = max(self.sequence_length, self.num_targets)
        return NUM_UNUSED_POSITIONS + (longest if self.max_positions is None else self.max_positions)


class BARTSpec(EncoderDecoderSpec[BARTConfig]):
    """What is known of a BART from its config."""

    config_class = BARTConfig
    objectives = ("denoising", *EncoderDecoderSpec.objectives)

    def problems(self, config: BARTConfig) -> Iterator[Problem]:
        yield from heads_divide(config.hidden, config.heads)
        longest = max(config.sequence_length, config.num_targets)
        if config.max_positions is not None and config.max_positions < longest:
            yield Problem("model.max_positions", f"{config.max_positions} positions for {longest} tokens",
                          f"at least {longest}", f"set model.max_positions={longest}, or leave it out")
        yield from self.mixture_problems(config)

    def block(self, config: BARTConfig) -> BlockShape:
        return BlockShape(
            hidden=config.hidden, heads=config.heads, kv_heads=config.heads, head_dim=config.hidden // config.heads,
            ffn=config.ffn_hidden, num_tokens=config.sequence_length, norm="layernorm", norm_position="post",
            norm_epsilon=config.norm_epsilon, activation=config.activation, bias=True, dropout=config.dropout,
            attention_dropout=config.attention_dropout, std=config.init_std, residual_std=config.init_std,
        )

    def ends(self, config: BARTConfig, num_predictions: int | None = None) -> dict[str, EndShape]:
        positions = config.num_positions * config.hidden + norm_parameters("layernorm", config.hidden)
        return {
            "embedding": self.table(config), "encoder.input": EndShape(num_parameters=positions),
            "decoder.input": EndShape(num_parameters=positions, num_lookups=config.num_targets * config.hidden),
            "head": self.head(config, tied=True, num_predictions=num_predictions),
        }


SPEC = BARTSpec()
