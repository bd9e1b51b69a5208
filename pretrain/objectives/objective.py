"""The contract an objective fulfils (no torch).

An objective is what the loss is, and what is done to a sample before: a config class (the fields of the `objective`
section), an `ObjectiveSpec` with what follows from the config alone, a function that makes the webdataset stages which
turn a window of tokens into the fields of a batch, and a class that turns a batch into inputs, targets and the terms of
a loss (`parallel.objective.Objective`). One line in `pretrain.objectives.OBJECTIVES` makes it known.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, Generic, TypeVar

from pydantic import BaseModel

from common.errors import Problem
from data_pipeline.corruption.noise_seed import NoiseSeed
from data_pipeline.corruption.special_ids import SpecialIds
from parallel.config import STRICT
from pretrain.models.family import SequenceModel


class ObjectiveConfig(BaseModel):
    """The fields of `objective` that every objective has; its own class adds the others."""

    model_config = STRICT

    name: str


Config = TypeVar("Config", bound=ObjectiveConfig)
Model = TypeVar("Model", bound=SequenceModel)

END_OF_TEXT_ROLE = "end_of_text"  # the one role that is a token of the tokenizer and no field of SpecialIds


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """Which special tokens an objective uses. A role is a field of `SpecialIds`, or END_OF_TEXT_ROLE.

    Args:
        needed: roles that a tokenizer of another project must have a token for; sentinels are counted apart.
        named: further roles that an exported tokenizer has a name for.
        sentinel_names: their names in an exported tokenizer; (): `<extra_id_0>` and so on.
        before, after: roles that stand before and after the text of a sample.
        decoder_start: role of the first input of a decoder that has a source.
    """

    needed: tuple[str, ...] = ()
    named: tuple[str, ...] = ()
    sentinel_names: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    decoder_start: str = "pad"

    def names_of_sentinels(self, count: int) -> tuple[str, ...]:
        """Names of `count` sentinels, the first one first."""
        return self.sentinel_names[:count] or tuple(f"<extra_id_{number}>" for number in range(count))


@dataclass(frozen=True, kw_only=True)
class StageInputs(Generic[Config, Model]):
    """What the function that makes an objective's stages is given.

    Args:
        dataset: open for reading: of a folder or in memory. Its tokenizer is used, and its windows for pairs of
            segments.
        window_tokens: tokens of one sample before anything is done to it (`ObjectiveSpec.window_tokens`).
        seed: that of the noise.
        special: the ids of the objective's special tokens.
    """

    config: Config
    model: Model
    dataset: Any
    window_tokens: int
    seed: NoiseSeed
    special: SpecialIds


def sequence_length(config: ObjectiveConfig, model: SequenceModel) -> int:
    """The window of an objective that takes a sample as long as the model does."""
    return model.sequence_length


def all_tokens(config: ObjectiveConfig, model: SequenceModel) -> int | None:
    """Predictions of an objective whose head makes logits for every token of a sample."""
    return None


def no_ids(config: ObjectiveConfig, model: SequenceModel) -> int:
    """Reserved ids of an objective without special tokens."""
    return 0


def no_problems(config: ObjectiveConfig, model: SequenceModel) -> Iterator[Problem]:
    """Problems of an objective that fits every model."""
    return iter(())


@dataclass(frozen=True)
class ObjectiveSpec(Generic[Config, Model]):
    """What is known of an objective from the sections `objective` and `model` alone.

    Args:
        config_class: the fields of the `objective` section.
        losses: by `FamilySpec.form`, "module:Class", loaded on demand because it imports torch; the class is made with
            (objective config, model config, tensor axis).
        stages: "module:function", loaded on demand for the same reason; from `StageInputs` to the webdataset stages
            between a window of tokens and a batch.
        window_tokens: tokens of one sample before anything is done to it; windows hold one more, the next token.
        reserved_ids: ids at the top of the model's vocabulary that the tokenizer may not use.
        problems: what does not fit the model.
        num_predictions: tokens of a sample for which the model's head makes logits; None: all.
        special: the special tokens that it uses.
    """

    config_class: type[Config]
    losses: Mapping[str, str]
    stages: str
    _: KW_ONLY
    window_tokens: Callable[[Config, Model], int] = sequence_length
    reserved_ids: Callable[[Config, Model], int] = no_ids
    problems: Callable[[Config, Model], Iterator[Problem]] = no_problems
    num_predictions: Callable[[Config, Model], int | None] = all_tokens
    special: SpecialTokens = SpecialTokens()
