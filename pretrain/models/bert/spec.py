"""Facts of BERT (Devlin et al. 2019) and RoBERTa (Liu et al. 2019): fields and counts (no torch)."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from parallel.layout import divisors
from parallel.rules.model_traits import ModelTraits
from parallel.rules.rule import Found
from pretrain.models.counting import PartSizes, flops
from pretrain.models.family import FamilySpec, TextConfig


class BERTConfig(TextConfig):
    """An encoder with post-norm blocks, learned positions and a head for hidden tokens. The defaults are BERT's."""

    family: Literal["bert"] = Field("bert", description="the architecture")
    layers: int = Field(ge=1, description="number of blocks")
    hidden: int = Field(ge=1, description="width of the residual stream")
    heads: int = Field(ge=1, description="number of attention heads; hidden / heads is the width of one")
    ffn: int | None = Field(None, ge=1, description="inner width of the feed-forward part; null: 4 x hidden")
    max_positions: int | None = Field(
        None, ge=1, description="length of the table of positions, without the offset; null: sequence_length"
    )
    position_offset: int = Field(0, ge=0, description="row of the first position in their table; 2 in RoBERTa")
    segment_types: int = Field(2, ge=1, description="kinds of segments; 1 in RoBERTa")
    next_sentence: bool = Field(
        True, description="samples are pairs of segments, and a second head judges whether they follow each other"
    )
    activation: Literal["gelu", "gelu_tanh", "relu"] = Field(
        "gelu", description="non-linearity of the feed-forward part"
    )
    norm_epsilon: float = Field(1e-12, gt=0, description="added to the variance in a norm; 1e-5 in RoBERTa")
    dropout: float = Field(0.0, ge=0, lt=1, description="part of embedding and residual activations set to 0")
    attention_dropout: float = Field(0.0, ge=0, lt=1, description="part of attention weights set to 0")
    init_std: float = Field(0.02, gt=0, description="standard deviation of initial weights")

    @property
    def ffn_hidden(self) -> int:
        """Inner width of the feed-forward part."""
        return 4 * self.hidden if self.ffn is None else self.ffn

    @property
    def num_positions(self) -> int:
        """Rows of the table of positions as built."""
        length = self.sequence_length if self.max_positions is None else self.max_positions
        return self.position_offset + length

    @property
    def num_frame_tokens(self) -> int:
        """Special tokens around the text of a sample: the first, and one after each segment."""
        return 3 if self.next_sentence else 2


def problems(config: BERTConfig) -> Iterator[Found]:
    """What does not fit together inside one model, as (where, asked, possible, change)."""
    if config.hidden % config.heads:
        yield ("model.heads", f"hidden={config.hidden} in {config.heads} heads", "heads that divide hidden",
               f"set model.heads to one of {', '.join(map(str, divisors(config.hidden)))}")
    if config.max_positions is not None and config.max_positions < config.sequence_length:
        yield ("model.max_positions", f"{config.max_positions} positions for {config.sequence_length} tokens",
               f"at least {config.sequence_length}",
               f"set model.max_positions={config.sequence_length}, or leave it out")
    if config.next_sentence and config.segment_types < 2:
        yield ("model.segment_types", f"{config.segment_types} for pairs of segments", "at least 2",
               "set model.segment_types=2, or model.next_sentence=false")


def facts(config: BERTConfig) -> ModelTraits:
    """What the rules need to know."""
    return ModelTraits(
        layers=config.layers, heads=config.heads, kv_heads=config.heads, hidden=config.hidden, ffn=config.ffn_hidden,
        vocab_size=config.padded_vocab_size, sequence_length=config.sequence_length,
        why_no_context="the head predicts chosen tokens of a sequence that it needs whole",
    )


def sizes(config: BERTConfig) -> PartSizes:
    """What its blocks are made of."""
    return PartSizes(config.hidden, config.heads, config.hidden // config.heads, config.ffn_hidden, gated=False,
                     bias=True, norm=2 * config.hidden)


def parameter_count(config: BERTConfig) -> int:
    """Parameters with the vocabulary as it is: encoder and the heads of pretraining, that for hidden tokens (matrix,
    norm, the bias of the tied output) and with `next_sentence` the pooler and the judgement.
    """
    return _parameters(config, config.vocab_size)


def built_parameter_count(config: BERTConfig) -> int:
    """Parameters with the vocabulary padded, which is what memory holds."""
    return _parameters(config, config.padded_vocab_size)


def flops_per_token(config: BERTConfig, window_tokens: int) -> int:
    """FLOPs of a sample over the tokens of text in it; 15 % of the tokens reach the head."""
    length = config.sequence_length
    total = config.layers * sizes(config).products(length, length)
    total += round(0.15 * length) * config.hidden * (config.padded_vocab_size + config.hidden)
    return flops(total) // window_tokens


def _parameters(config: BERTConfig, vocab_size: int) -> int:
    hidden, parts = config.hidden, sizes(config)
    ends = (vocab_size + config.num_positions + config.segment_types) * hidden + parts.norm
    head = hidden * hidden + hidden + parts.norm + vocab_size
    judgement = hidden * hidden + hidden + 2 * hidden + 2 if config.next_sentence else 0
    return ends + config.layers * parts.block() + head + judgement


SPEC = FamilySpec(
    config_class=BERTConfig,
    form="encoder",
    evaluation="masked_quality",
    objectives=("masked_lm",),
    problems=problems,
    facts=facts,
    parameter_count=parameter_count,
    built_parameter_count=built_parameter_count,
    flops_per_token=flops_per_token,
)
