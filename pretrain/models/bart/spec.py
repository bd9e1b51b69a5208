"""Facts of BART (Lewis et al. 2020): fields and counts (no torch)."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from parallel.layout import divisors
from parallel.rules.rule import Found
from pretrain.models import encoder_decoder, mixture
from pretrain.models.counting import PartSizes
from pretrain.models.encoder_decoder import EncoderDecoderConfig
from pretrain.models.family import FamilySpec

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


def problems(config: BARTConfig) -> Iterator[Found]:
    """What does not fit together inside one model, as (where, asked, possible, change)."""
    if config.hidden % config.heads:
        yield ("model.heads", f"hidden={config.hidden} in {config.heads} heads", "heads that divide hidden",
               f"set model.heads to one of {', '.join(map(str, divisors(config.hidden)))}")
    longest = max(config.sequence_length, config.num_targets)
    if config.max_positions is not None and config.max_positions < longest:
        yield ("model.max_positions", f"{config.max_positions} positions for {longest} tokens",
               f"at least {longest}", f"set model.max_positions={longest}, or leave it out")
    yield from mixture.problems(config, *encoder_decoder.sides(config))


def sizes(config: BARTConfig) -> PartSizes:
    """What its blocks are made of."""
    return PartSizes(config.hidden, config.heads, config.hidden // config.heads, config.ffn_hidden, gated=False,
                     bias=True, norm=2 * config.hidden)


def parameter_count(config: BARTConfig) -> int:
    """Parameters with the vocabulary as it is, which is what is published; the one token table counts once."""
    return _parameters(config, config.vocab_size)


def built_parameter_count(config: BARTConfig) -> int:
    """Parameters with the vocabulary padded, which is what memory holds."""
    return _parameters(config, config.padded_vocab_size)


def _parameters(config: BARTConfig, vocab_size: int) -> int:
    parts = sizes(config)
    ends = vocab_size * config.hidden + 2 * (config.num_positions * config.hidden + parts.norm)
    return ends + encoder_decoder.blocks(config, parts)


SPEC = FamilySpec(
    config_class=BARTConfig,
    form="encoder_decoder",
    evaluation="masked_quality",
    generation="answer",
    objectives=("denoising", "span_corruption", "prefix_lm"),
    problems=problems,
    facts=encoder_decoder.facts,
    parameter_count=parameter_count,
    built_parameter_count=built_parameter_count,
    flops_per_token=encoder_decoder.flops_per_token(sizes),
    idle_parameter_count=encoder_decoder.idle_parameter_count(sizes),
)
