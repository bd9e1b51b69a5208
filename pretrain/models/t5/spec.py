"""Facts of T5 (Raffel et al. 2020) and its version 1.1 (Shazeer 2020): fields and counts (no torch)."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from parallel.layout import divisors
from parallel.rules.rule import Found
from pretrain.models import encoder_decoder, mixture
from pretrain.models.counting import PartSizes
from pretrain.models.encoder_decoder import EncoderDecoderConfig
from pretrain.models.family import FamilySpec


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
    def width(self) -> int:
        """Width of one attention head."""
        return self.hidden // self.heads if self.head_width is None else self.head_width


def problems(config: T5Config) -> Iterator[Found]:
    """What does not fit together inside one model, as (where, asked, possible, change)."""
    if config.head_width is None and config.hidden % config.heads:
        yield ("model.heads", f"hidden={config.hidden} in {config.heads} heads", "heads that divide hidden",
               f"set model.heads to one of {', '.join(map(str, divisors(config.hidden)))}, or model.head_width")
    exact = config.relative_buckets // 4  # of the encoder, which has half of the buckets for either side
    if config.relative_max_distance <= 2 * exact:
        yield ("model.relative_max_distance", f"{config.relative_max_distance} with {config.relative_buckets} buckets",
               f"more than {2 * exact}, the distances that have a bucket each",
               f"set model.relative_max_distance={2 * exact + 1} or more")
    yield from mixture.problems(config, *encoder_decoder.sides(config))


def sizes(config: T5Config) -> PartSizes:
    """What its blocks are made of."""
    return PartSizes(config.hidden, config.heads, config.width, config.ffn_hidden, config.activation != "relu",
                     bias=False, norm=config.hidden)


def parameter_count(config: T5Config) -> int:
    """Parameters with the vocabulary as it is, which is what is published. Tied weights count once."""
    return _parameters(config, config.vocab_size)


def built_parameter_count(config: T5Config) -> int:
    """Parameters with the vocabulary padded, which is what memory holds. Tied weights count once."""
    return _parameters(config, config.padded_vocab_size)


def _parameters(config: T5Config, vocab_size: int) -> int:
    parts = sizes(config)
    tables = vocab_size * config.hidden * (1 if config.tied_head else 2)
    biases = 2 * config.relative_buckets * config.heads
    return tables + biases + encoder_decoder.blocks(config, parts) + 2 * config.hidden


SPEC = FamilySpec(
    config_class=T5Config,
    form="encoder_decoder",
    evaluation="masked_quality",
    generation="answer",
    objectives=("span_corruption", "prefix_lm"),
    problems=problems,
    facts=encoder_decoder.facts,
    parameter_count=parameter_count,
    built_parameter_count=built_parameter_count,
    flops_per_token=encoder_decoder.flops_per_token(sizes),
    idle_parameter_count=encoder_decoder.idle_parameter_count(sizes),
)
