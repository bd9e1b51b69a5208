"""The contract an objective fulfils (facts: no torch).

An objective is what the loss is, and what is done to a sample before: a config class (the fields of the `objective`
section), an `ObjectiveSpec` with what can be said of it without data or model, a function that makes the webdataset
stages which turn a window of tokens into the fields of a batch, and a class that turns a batch into inputs, targets and
a loss (`parallel.engine.Objective`). One line in `pretrain.objectives.OBJECTIVES` makes it known.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pydantic import BaseModel

from common.errors import Problem
from parallel.config import STRICT
from pretrain.models.family import FamilyConfig


class ObjectiveConfig(BaseModel):
    """The fields of `objective` that every objective has; its own class adds the others."""

    model_config = STRICT

    name: str


@dataclass(frozen=True)
class ObjectiveSpec:
    """What is known of an objective from the sections `objective` and `model` alone.

    Args:
        config_class: the fields of the `objective` section.
        losses: by the form of the family (`FamilySpec.form`), "module:Class"; the class is made with the tensor tp.
        stages: "module:function"; called with (objective config, model config, open dataset, seed, special ids), it
            returns the webdataset stages between a window of tokens and a batch. The seed is a number, or a text for
            held-out data.
        window_tokens: tokens of one sample before anything is done to it; windows hold one more, the next token.
        reserved_ids: ids at the top of the model's vocabulary that the tokenizer may not use.
        problems: what does not fit the model.
        num_predictions: tokens of a sample for which the model's head makes logits; None: all.
    """

    config_class: type[ObjectiveConfig]
    losses: dict[str, str]
    stages: str
    window_tokens: Callable[[ObjectiveConfig, FamilyConfig], int]
    reserved_ids: Callable[[ObjectiveConfig, FamilyConfig], int]
    problems: Callable[[ObjectiveConfig, FamilyConfig], Iterator[Problem]]
    num_predictions: Callable[[ObjectiveConfig, FamilyConfig], int | None] = lambda config, model: None
