"""Fields and shapes that families of encoder and decoder share; no torch."""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar, TypeVar

from pydantic import Field

from common.errors import Problem
from parallel.rules.model_traits import ModelTraits
from pretrain.models import mixture
from pretrain.models.family import FamilySpec, TextConfig
from pretrain.models.mixture import MixtureFields
from pretrain.models.shapes import BlockShape, BlockStack, EndShape


class EncoderDecoderConfig(MixtureFields, TextConfig):
    """Fields of a model with an encoder for the source and a decoder for the target."""

    sequence_length: int = Field(ge=1, description="tokens of the source, what the encoder takes")
    target_length: int | None = Field(
        None, ge=1, description="tokens of the target, what the decoder takes; null: as sequence_length"
    )
    layers: int = Field(ge=1, description="number of blocks of the encoder")
    decoder_layers: int | None = Field(None, ge=1, description="number of blocks of the decoder; null: as layers")
    hidden: int = Field(ge=1, description="width of the residual stream")
    heads: int = Field(ge=1, description="number of attention heads")
    ffn: int | None = Field(None, ge=1, description="inner width of the feed-forward part; null: 4 x hidden")
    dropout: float = Field(0.0, ge=0, lt=1, description="part of embedding and residual activations set to 0")
    attention_dropout: float = Field(0.0, ge=0, lt=1, description="part of attention weights set to 0")

    @property
    def num_targets(self) -> int:
        """Tokens that the decoder takes."""
        return self.sequence_length if self.target_length is None else self.target_length

    @property
    def num_decoder_layers(self) -> int:
        return self.layers if self.decoder_layers is None else self.decoder_layers

    @property
    def ffn_hidden(self) -> int:
        """Inner width of the feed-forward part."""
        return 4 * self.hidden if self.ffn is None else self.ffn


Config = TypeVar("Config", bound=EncoderDecoderConfig)


class EncoderDecoderSpec(FamilySpec[Config]):
    """What families of encoder and decoder have in common; each gives its blocks and the layers around them."""

    form = "encoder_decoder"
    # of every such family; the first one is the usual one
    objectives: ClassVar[tuple[str, ...]] = ("span_corruption", "prefix_lm", "gap_sentences")
    evaluation = "masked_quality"
    generation = "answer"

    @abstractmethod
    def block(self, config: Config) -> BlockShape:
        """A dense block of the encoder."""

    def traits(self, config: Config) -> ModelTraits:
        return replace(
            super().traits(config), target_length=config.num_targets,
            why_no_context="attention from the target to the source needs both sequences whole on every rank")

    def stacks(self, config: Config) -> tuple[BlockStack, ...]:
        encoder = self.block(config)
        decoder = replace(encoder, num_tokens=config.num_targets, num_memory_tokens=config.sequence_length)
        sides = (("encoder.blocks", config.layers, encoder), ("decoder.blocks", config.num_decoder_layers, decoder))
        return tuple(BlockStack(name=name, num_blocks=count, dense=block, mixture=config.mixture,
                                mixture_every=config.expert_every) for name, count, block in sides)

    def mixture_problems(self, config: Config) -> Iterator[Problem]:
        return mixture.problems(config, config.layers, config.num_decoder_layers)

    def table(self, config: Config) -> EndShape:
        """The token table with its lookup of the source."""
        return EndShape(per_token_id=config.hidden, num_lookups=config.sequence_length * config.hidden)

    def head(self, config: Config, *, tied: bool, num_predictions: int | None) -> EndShape:
        """Logits of the target's tokens."""
        predictions = config.num_targets if num_predictions is None else num_predictions
        return EndShape(per_token_id=0 if tied else config.hidden,
                        multiply_adds=predictions * config.hidden * config.padded_vocab_size)
