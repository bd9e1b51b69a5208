"""Facts that families of encoder and decoder share: fields and what follows from them (no torch)."""

from collections.abc import Callable

from pydantic import Field

from parallel.rules.model_traits import ModelTraits
from pretrain.models import mixture
from pretrain.models.counting import PartSizes, flops
from pretrain.models.family import TextConfig
from pretrain.models.mixture import MixtureFields


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


def facts(config: EncoderDecoderConfig) -> ModelTraits:
    """What the rules need to know."""
    return ModelTraits(
        layers=config.layers + config.num_decoder_layers, heads=config.heads, kv_heads=config.heads,
        hidden=config.hidden, ffn=config.ffn_hidden, vocab_size=config.padded_vocab_size,
        sequence_length=config.sequence_length, target_length=config.num_targets,
        experts=config.experts, expert_ffn=config.expert_width, shared_expert_ffn=config.shared_width,
        why_no_context="attention from the target to the source needs both sequences whole on every rank",
    )


def blocks(config: EncoderDecoderConfig, parts: PartSizes) -> int:
    """Parameters of the blocks of both sides."""
    total = config.layers * parts.block() + config.num_decoder_layers * parts.block(cross=True)
    return total + sum(mixture.added_parameters(config, layers, parts.gated, parts.bias) for layers in sides(config))


def sides(config: EncoderDecoderConfig) -> tuple[int, int]:
    """Blocks of the encoder and of the decoder."""
    return config.layers, config.num_decoder_layers


def idle_parameter_count(sizes: Callable[[EncoderDecoderConfig], PartSizes]) -> Callable[[EncoderDecoderConfig], int]:
    """The function of a family whose blocks have these sizes: parameters of experts that one token does not meet."""

    def count(config: EncoderDecoderConfig) -> int:
        parts = sizes(config)
        return sum(mixture.added_parameters(config, layers, parts.gated, parts.bias)
                   - mixture.added_active_parameters(config, layers, parts.gated, parts.bias)
                   for layers in sides(config))

    return count


def flops_per_token(sizes: Callable[[EncoderDecoderConfig], PartSizes]) -> Callable[[EncoderDecoderConfig, int], int]:
    """The function of a family whose blocks have these sizes."""

    def count(config: EncoderDecoderConfig, window_tokens: int) -> int:
        """FLOPs of a whole sample, source and target, spread over the tokens of text that it was made from."""
        source, target, parts = config.sequence_length, config.num_targets, sizes(config)
        total = config.layers * parts.products(source, source)
        total += config.num_decoder_layers * parts.products(target, target, source)
        total += target * config.hidden * config.padded_vocab_size
        total += sum(length * mixture.added_active_parameters(config, layers, parts.gated, bias=False)
                     for length, layers in zip((source, target), sides(config), strict=True))
        return flops(total) // window_tokens

    return count
