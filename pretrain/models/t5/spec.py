"""T5 (Raffel et al. 2020) and its version 1.1 (Shazeer 2020): fields, limits and shapes of layers; no torch."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from common.errors import Problem
from pretrain.models.encoder_decoder import EncoderDecoderConfig, EncoderDecoderSpec
from pretrain.models.family import heads_divide
from pretrain.models.shapes import BlockShape, EndShape, norm_parameters


class T5Config(EncoderDecoderConfig):
    """An encoder-decoder with relative positions, RMS norms and no biases. The defaults are version 1.0."""

    family: Literal["t5"] = Field("t5", description="the architecture")
    head_width: int | None = Field(None, ge=1, description="width of one attention head; null: hidden / heads")
    activation: Literal["relu", "geglu_tanh"] = Field(
        "relu", description="non-linearity of the feed-forward part: `relu` in version 1.0, `geglu_tanh` with a gate "
        "matrix in 1.1"
    )
    tied_head: bool = Field(
        True, description="the output head is the token embedding, scaled by hidden^-0.5 (version 1.0); false: a "
        "matrix of its own (1.1)"
    )
    relative_buckets: int = Field(32, ge=4, multiple_of=4, description="distances that have a bias of their own")
    relative_max_distance: int = Field(128, ge=2, description="distance from which on all share one bias")
    norm_epsilon: float = Field(1e-6, gt=0, description="added to the mean square in a norm")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        # at least 1, also where more heads than hidden are a problem that `problems` reports
        return max(1, self.hidden // self.heads) if self.head_width is None else self.head_width


class T5Spec(EncoderDecoderSpec[T5Config]):
    """What is known of a T5 from its config."""

    config_class = T5Config

    def problems(self, config: T5Config) -> Iterator[Problem]:
        if config.head_width is None:
            yield from heads_divide(config.hidden, config.heads, or_else="give model.head_width")
        exact = config.relative_buckets // 4  # of the encoder, which has half of the buckets for either side
        if config.relative_max_distance <= 2 * exact:
            yield Problem("model.relative_max_distance",
                          f"{config.relative_max_distance} with {config.relative_buckets} buckets",
                          f"more than {2 * exact}, the distances that have a bucket each",
                          f"set model.relative_max_distance={2 * exact + 1} or more")
        yield from self.mixture_problems(config)

    def block(self, config: T5Config) -> BlockShape:
        """Standard deviations are those of the published training code."""
        return BlockShape(
            hidden=config.hidden, heads=config.heads, kv_heads=config.heads, head_dim=config.head_dim,
            ffn=config.ffn_hidden, num_tokens=config.sequence_length, norm="rmsnorm", norm_position="pre",
            norm_epsilon=config.norm_epsilon, activation=config.activation, bias=False, dropout=config.dropout,
            attention_dropout=config.attention_dropout, std=config.hidden**-0.5,
            residual_std=(config.heads * config.head_dim) ** -0.5, attention_scale=1.0,
            query_std=(config.hidden * config.head_dim) ** -0.5, down_std=config.ffn_hidden**-0.5,
        )

    def ends(self, config: T5Config, num_predictions: int | None = None) -> dict[str, EndShape]:
        bias = EndShape(num_parameters=config.relative_buckets * config.heads)
        norm = EndShape(num_parameters=norm_parameters("rmsnorm", config.hidden))
        return {
            "embedding": self.table(config), "encoder.input": EndShape(), "encoder.bias": bias,
            "encoder.final_norm": norm,
            "decoder.embedding": EndShape(num_lookups=config.num_targets * config.hidden), "decoder.bias": bias,
            "decoder.final_norm": norm,
            "head": self.head(config, tied=config.tied_head, num_predictions=num_predictions),
        }


SPEC = T5Spec()
