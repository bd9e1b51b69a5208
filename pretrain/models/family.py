"""The contract a family fulfils (facts: no torch).

A family is a folder under `pretrain/models/` with two files:

- `spec.py`, facts: a config class (the fields of the `model` section) and `SPEC`, a `FamilySpec` with what can be said
  of the model without building it;
- `modules.py`, torch: `layers(config, ...) -> list`, the ordered list of named layers (embedding, blocks, head). A
  pipeline stage is a slice of it, and a model on one stage runs the same list.

One line in `pretrain.models.FAMILIES` makes the family known.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel

from parallel.config import STRICT
from parallel.rules import Found, ModelFacts


class FamilyConfig(BaseModel):
    """The fields of `model` that every family has; its own class says what they mean to it."""

    model_config = STRICT

    family: str
    vocab_size: int
    sequence_length: int


@dataclass(frozen=True)
class FamilySpec:
    """What is known of a family's models from their config alone. The functions take a `config_class`."""

    config_class: type[FamilyConfig]
    objectives: tuple[str, ...]  # names of the objectives it can be trained with, the usual one first
    problems: Callable[[FamilyConfig], Iterator[Found]]  # what the fields cannot say one by one
    facts: Callable[[FamilyConfig], ModelFacts]
    parameter_count: Callable[[FamilyConfig], int]  # as published: the vocabulary without padding
    built_parameter_count: Callable[[FamilyConfig], int]  # as held in memory: with padding
    # forward and backward for one `unit`, for a sequence length in tokens
    flops_per_token: Callable[[FamilyConfig, int], int]
    reads: Literal["tokens", "pairs"] = "tokens"  # what its data is made of: documents, or images with captions

    @property
    def unit(self) -> str:
        """What progress and speed are counted in."""
        return "tokens" if self.reads == "tokens" else "samples"
