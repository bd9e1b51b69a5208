"""BERT (Devlin et al. 2019) and RoBERTa (Liu et al. 2019): fields, limits and shapes of layers; no torch."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

from pydantic import Field

from common.errors import Problem
from parallel.rules.model_traits import ModelTraits
from pretrain.models.family import FamilySpec, TextConfig, heads_divide
from pretrain.models.shapes import BlockShape, BlockStack, EndShape, norm_parameters


class BERTConfig(TextConfig):
    """An encoder with post-norm blocks, learned positions and a head for masked tokens. The defaults are BERT's."""

    family: Literal["bert"] = Field("bert", description="the architecture")
    layers: int = Field(ge=1, description="number of blocks")
    shared_blocks: bool = Field(
        False, description="one block's weights serve all blocks (ALBERT: Lan et al. 2020, section 3.1)"
    )
    hidden: int = Field(ge=1, description="width of the residual stream")
    heads: int = Field(ge=1, description="number of attention heads; hidden / heads is the width of one")
    ffn: int | None = Field(None, ge=1, description="inner width of the feed-forward part; null: 4 x hidden")
    max_positions: int | None = Field(
        None, ge=1, description="length of the table of positions, without the offset; null: sequence_length"
    )
    position_offset: int = Field(0, ge=0, description="row of the first position in their table; 2 in RoBERTa")
    segment_types: int = Field(2, ge=1, description="kinds of segments; 1 in RoBERTa")
    next_sentence: bool = Field(
        True, description="samples are pairs of segments, and a second head predicts whether they follow each other"
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


class BERTSpec(FamilySpec[BERTConfig]):
    """What is known of a BERT from its config."""

    config_class = BERTConfig
    form = "encoder"
    evaluation = "masked_quality"
    objectives = ("masked_lm",)

    def problems(self, config: BERTConfig) -> Iterator[Problem]:
        yield from heads_divide(config.hidden, config.heads)
        if config.max_positions is not None and config.max_positions < config.sequence_length:
            yield Problem("model.max_positions",
                          f"{config.max_positions} positions for {config.sequence_length} tokens",
                          f"at least {config.sequence_length}",
                          f"set model.max_positions={config.sequence_length}, or leave it out")
        if config.next_sentence and config.segment_types < 2:
            yield Problem("model.segment_types", f"{config.segment_types} for pairs of segments", "at least 2",
                          "set model.segment_types=2, or model.next_sentence=false")

    def traits(self, config: BERTConfig) -> ModelTraits:
        return replace(super().traits(config),
                       why_no_context="the head predicts chosen tokens of a sequence that it needs whole")

    def stacks(self, config: BERTConfig) -> tuple[BlockStack, ...]:
        block = BlockShape(
            hidden=config.hidden, heads=config.heads, kv_heads=config.heads, head_dim=config.hidden // config.heads,
            ffn=config.ffn_hidden, num_tokens=config.sequence_length, norm="layernorm", norm_position="post",
            norm_epsilon=config.norm_epsilon, activation=config.activation, bias=True, dropout=config.dropout,
            attention_dropout=config.attention_dropout, std=config.init_std, residual_std=config.init_std,
        )
        return (BlockStack(name="blocks", num_blocks=config.layers, dense=block, shared=config.shared_blocks),)

    def ends(self, config: BERTConfig, num_predictions: int | None = None) -> dict[str, EndShape]:
        """The head is that for masked tokens (matrix, norm, bias of the tied output), and with `next_sentence` the
        pooler and the classifier of the pair.
        """
        hidden, norm = config.hidden, norm_parameters("layernorm", config.hidden)
        dense = hidden * hidden + hidden
        pair = dense + 2 * hidden + 2 if config.next_sentence else 0
        predictions = config.sequence_length if num_predictions is None else num_predictions
        return {
            "embedding": EndShape(per_token_id=hidden, num_lookups=config.sequence_length * hidden),
            "input": EndShape(num_parameters=(config.num_positions + config.segment_types) * hidden + norm),
            "head": EndShape(num_parameters=dense + norm + pair, per_token_id=1,
                             multiply_adds=predictions * hidden * (config.padded_vocab_size + hidden)),
        }


SPEC = BERTSpec()
