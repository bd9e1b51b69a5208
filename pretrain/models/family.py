"""The contract a family fulfils (facts: no torch).

A family is a folder under `pretrain/models/` with two files:

- `spec.py`, facts: a config class (the fields of the `model` section) and `SPEC`, a `FamilySpec` with what can be said
  of the model without building it;
- `modules.py`, torch: `layers(config, ...) -> list`, the ordered list of named layers (embedding, blocks, head). A
  pipeline stage is a slice of it, and a model on one stage runs the same list.

A third file, `hf.py`, is there where transformers has the architecture: an `HFAdapter` (`hf_adapter.py`), with its
names beside ours in the terms of `hf_map.py`. A family without it trains like any other and is not exported.

One line in `pretrain.models.FAMILIES` makes the family known.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, Field

from parallel.config import STRICT
from parallel.rules.model_traits import ModelTraits
from parallel.rules.rule import Found


class FamilyConfig(BaseModel):
    """The fields of `model` that every family has; its own class says what they mean to it."""

    model_config = STRICT

    family: str
    vocab_size: int
    sequence_length: int


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


@dataclass(frozen=True)
class FamilySpec:
    """What is known of a family's models from their config alone. The functions take a `config_class`."""

    config_class: type[FamilyConfig]
    # key of the loss in `ObjectiveSpec.losses`, and used for nothing else
    form: str
    # the file of pretrain/inference by which `trainyard evaluate` measures it: the loss of every next token, the loss
    # of the tokens that its objective corrupts, or classification and retrieval of images
    evaluation: Literal["language", "masked_quality", "zero_shot"]
    objectives: tuple[str, ...]  # names of the objectives it can be trained with, the usual one first
    problems: Callable[[FamilyConfig], Iterator[Found]]  # what the fields cannot say one by one
    facts: Callable[[FamilyConfig], ModelTraits]
    parameter_count: Callable[[FamilyConfig], int]  # as published: the vocabulary without padding
    built_parameter_count: Callable[[FamilyConfig], int]  # as held in memory: with padding
    # forward and backward for one `unit`, for samples of so many tokens of text
    flops_per_token: Callable[[FamilyConfig, int], int]
    # parameters of experts that one token does not meet; the others are the active ones
    idle_parameter_count: Callable[[FamilyConfig], int] = lambda config: 0
    reads: Literal["tokens", "pairs"] = "tokens"  # its data: tokens of documents, or pairs of image and caption
    # whether it continues a prompt (`trainyard generate`) or writes an answer to a source (`evaluate --examples`)
    generation: Literal["continuation", "answer"] | None = None

    @property
    def unit(self) -> str:
        """What progress and speed are counted in."""
        return "tokens" if self.reads == "tokens" else "samples"
