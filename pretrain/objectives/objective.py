"""The contract an objective fulfils (facts: no torch).

An objective is what the loss is, and what is done to a sample before: a config class (the fields of the `objective`
section), an `ObjectiveSpec` with what can be said of it without data or model, a function that makes the webdataset
stages which turn a window of tokens into the fields of a batch, and a class that turns a batch into inputs, targets and
a loss (`parallel.engine.Objective`). One line in `pretrain.objectives.OBJECTIVES` makes it known.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pydantic import BaseModel

from parallel.config import STRICT
from parallel.rules.rule import Found
from pretrain.models.family import FamilyConfig


class ObjectiveConfig(BaseModel):
    """The fields of `objective` that every objective has; its own class adds the others."""

    model_config = STRICT

    name: str


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


@dataclass(frozen=True)
class ObjectiveSpec:
    """What is known of an objective from the sections `objective` and `model` alone.

    Args:
        config_class: the fields of the `objective` section.
        losses: by `FamilySpec.form`, "module:Class"; the class is made with the tensor tp.
        stages: "module:function"; called with (objective config, model config, open dataset, seed, special ids), it
            returns the webdataset stages between a window of tokens and a batch. The seed is a number, or a text for
            held-out data.
        window_tokens: tokens of one sample before anything is done to it; windows hold one more, the next token.
        reserved_ids: ids at the top of the model's vocabulary that the tokenizer may not use.
        problems: what does not fit the model.
        special: the special tokens that it uses.
    """

    config_class: type[ObjectiveConfig]
    losses: dict[str, str]
    stages: str
    window_tokens: Callable[[ObjectiveConfig, FamilyConfig], int]
    reserved_ids: Callable[[ObjectiveConfig, FamilyConfig], int]
    problems: Callable[[ObjectiveConfig, FamilyConfig], Iterator[Found]]
    special: SpecialTokens = SpecialTokens()
