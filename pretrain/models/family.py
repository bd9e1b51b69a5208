"""The contract that a family fulfils; no torch.

A family is a folder under `pretrain/models/` with two files:

- `spec.py`, without torch: a config class (the fields of the `model` section) and `SPEC`, an object of a subclass of
  `FamilySpec`, with everything that can be said of the model without building it;
- `modules.py`, with torch: `layers(config, tp) -> list[LayerSpec]`, the ordered list of named layers (embedding,
  blocks, head). A pipeline stage is a part of the list, and a model on one stage runs all of it. Names of layers are
  those of the spec's shapes.

A third file, `hf.py`, without torch, is there where transformers has the architecture: an `HFAdapter`
(`hf_adapter.py`), with its names beside ours in the terms of `hf_map.py`. A family without it trains like any other and
is not exported.

One line in `pretrain.models.FAMILIES` makes the family known.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from math import gcd
from typing import ClassVar, Generic, Literal, Protocol, TypeVar

from pydantic import BaseModel, Field

from common.errors import Problem
from parallel.config import STRICT
from parallel.layout import divisors
from parallel.rules.model_traits import ModelTraits
from parallel.rules.rule import nearest_multiples
from pretrain.models.shapes import BlockShape, BlockStack, EndShape, LayerShape, flops


class FamilyConfig(BaseModel):
    """The fields of `model` that every family has; its own class says what they mean to it."""

    model_config = STRICT

    family: str
    vocab_size: int
    sequence_length: int
    freeze: list[str] = Field(
        [], description="patterns of parameter names (`*` and `?` as in file names, such as `embedding.*` or "
        "`blocks.0.*`); the parameters that they match are not trained"
    )


class SequenceModel(Protocol):
    """A config of a model, as far as an objective reads it. The classes below belong to one `FamilySpec.form` each."""

    @property
    def sequence_length(self) -> int: ...


class EncoderModel(SequenceModel, Protocol):
    """An encoder: tokens around the text of a sample, and whether it judges pairs of segments."""

    @property
    def num_frame_tokens(self) -> int: ...

    @property
    def next_sentence(self) -> bool: ...


class TargetModel(SequenceModel, Protocol):
    """An encoder-decoder: tokens that the decoder takes."""

    @property
    def num_targets(self) -> int: ...


class ImageTextModel(SequenceModel, Protocol):
    """A dual encoder: height and width of its images in pixels."""

    @property
    def image_size(self) -> int: ...


class TextConfig(FamilyConfig):
    """What every family on text has: a vocabulary and a length."""

    vocab_size: int = Field(ge=2, description="number of token ids")
    pad_vocab_to: int = Field(
        1, ge=1, description="the embedding is built with vocab_size rounded up to a multiple of this; no token id, "
        "target or prediction falls on the padding"
    )
    sequence_length: int = Field(ge=1, description="tokens in one training sequence")

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding as built."""
        return -(-self.vocab_size // self.pad_vocab_to) * self.pad_vocab_to


Config = TypeVar("Config", bound=TextConfig)


class FamilySpec(ABC, Generic[Config]):
    """What is known of a family's models from their config alone.

    Attributes:
        form: key of the loss in `ObjectiveSpec.losses`, and used for nothing else: decoder, encoder, encoder_decoder or
            dual_encoder.
        objectives: names of the objectives it can be trained with, the usual one first.
        reads: its data: `tokens` of documents, or `pairs` of image and caption.
        evaluation: the file of pretrain/inference by which `trainyard evaluate` measures it: the loss of every next
            token, the loss of the tokens that its objective corrupts, or classification and retrieval of images.
        generation: whether it continues a prompt (`trainyard generate`) or writes an answer to a source
            (`evaluate --examples`).
    """

    config_class: type[Config]
    form: ClassVar[str]
    objectives: ClassVar[tuple[str, ...]]
    reads: ClassVar[Literal["tokens", "pairs"]] = "tokens"
    evaluation: ClassVar[Literal["language", "masked_quality", "zero_shot"]]
    generation: ClassVar[Literal["continuation", "answer"] | None] = None

    @abstractmethod
    def problems(self, config: Config) -> Iterator[Problem]:
        """What the fields cannot say one by one, as (where, asked, possible, change)."""

    @abstractmethod
    def stacks(self, config: Config) -> tuple[BlockStack, ...]:
        """The stacks of blocks in the order of the layers."""

    @abstractmethod
    def ends(self, config: Config, num_predictions: int | None = None) -> dict[str, EndShape]:
        """Every layer that is no block, by name.

        Args:
            num_predictions: tokens of a sample for which the head makes logits, where the objective asks for some
                only; None: all.
        """

    def traits(self, config: Config) -> ModelTraits:
        """What the rules need to know. Where stacks differ in a size, what divides them all."""
        stacks = self.stacks(config)
        dense = [stack.dense for stack in stacks]
        mixture = next((stack.mixture for stack in stacks if stack.mixture), None)
        return ModelTraits(
            layers=sum(stack.num_blocks for stack in stacks), heads=gcd(*(block.heads for block in dense)),
            kv_heads=gcd(*(block.kv_heads for block in dense)), hidden=gcd(*(block.hidden for block in dense)),
            ffn=gcd(*(block.ffn for block in dense)), vocab_size=config.padded_vocab_size,
            sequence_length=config.sequence_length, experts=mixture.experts if mixture else 0,
            expert_ffn=mixture.ffn if mixture else 0, shared_expert_ffn=mixture.shared_ffn if mixture else 0,
        )

    def blocks(self, config: Config) -> list[BlockShape]:
        """The shape of every block in the order of the layers."""
        return [shape for stack in self.stacks(config) for _, shape in stack.named()]

    def layer_shapes(self, config: Config, num_predictions: int | None = None) -> dict[str, LayerShape]:
        """The shape of every layer by name; `num_predictions` as in `ends`."""
        blocks = {name: shape for stack in self.stacks(config) for name, shape in stack.named()}
        return {**blocks, **self.ends(config, num_predictions)}

    def parameter_count(self, config: Config) -> int:
        """Parameters with the vocabulary as it is, which is the published number. Shared weights count once."""
        return self._parameters(config, config.vocab_size)

    def built_parameter_count(self, config: Config) -> int:
        """Parameters with the vocabulary padded, which is what memory holds. Shared weights count once."""
        return self._parameters(config, config.padded_vocab_size)

    def idle_parameter_count(self, config: Config) -> int:
        """Parameters of experts that one token is not sent to; the others are the active ones."""
        return sum(stack.num_idle_parameters for stack in self.stacks(config))

    def flops_per_unit(self, config: Config, window_tokens: int, num_predictions: int | None = None) -> int:
        """Model FLOPs of forward and backward for one `unit`: a token of text, or a sample of pairs.

        Matrix products only, without recompute; attention counts the whole square, the lookup of a token nothing, a
        mixture the experts that a token is sent to. For a GPT with ffn = 4 hidden this is 72 s L h^2 (1 + s/6h +
        V/12Lh) for a sequence: Narayanan et al., SC21, section 5.1, and Korthikanti et al., arXiv 2205.05198,
        appendix A.

        Args:
            window_tokens: tokens of text that a sample is made from; the FLOPs of a sample are spread over them.
            num_predictions: as in `ends`.
        """
        products = sum(stack.multiply_adds for stack in self.stacks(config))
        products += sum(end.multiply_adds for end in self.ends(config, num_predictions).values())
        return flops(products) // (window_tokens if self.unit == "tokens" else 1)

    @property
    def unit(self) -> str:
        """What progress and speed are counted in."""
        return "tokens" if self.reads == "tokens" else "samples"

    def _parameters(self, config: Config, vocab_size: int) -> int:
        ends = self.ends(config).values()
        return (sum(stack.num_parameters for stack in self.stacks(config))
                + sum(end.num_parameters + end.per_token_id * vocab_size for end in ends))


def heads_divide(hidden: int, heads: int, *, prefix: str = "", or_else: str = "") -> Iterator[Problem]:
    """A problem where the heads of attention do not share the width out evenly.

    Args:
        prefix: before `heads` and `hidden` in the keys of the section.
        or_else: one more change that would help.
    """
    if hidden % heads == 0:
        return
    near = sorted(sorted(divisors(hidden), key=lambda number: abs(number - heads))[:3])
    multiples = " or ".join(map(str, nearest_multiples(hidden, heads)))
    yield Problem(f"model.{prefix}heads", f"{prefix}hidden={hidden} in {heads} heads",
                  f"heads that divide {prefix}hidden",
                  f"set model.{prefix}heads to one of {', '.join(map(str, near))}, or model.{prefix}hidden to "
                  f"{multiples}" + (f", or {or_else}" if or_else else ""))
