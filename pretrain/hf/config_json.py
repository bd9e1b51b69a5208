"""From a transformers config.json to our config and back, with every value that has no counterpart (no torch)."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from common.errors import Problem
from data_pipeline.corruption.special_ids import SpecialIds
from pretrain.config.run_config import RunConfig
from pretrain.models import FAMILIES, architectures, family_spec, hf_adapter
from pretrain.models.family import FamilyConfig
from pretrain.models.hf_map import (
    IGNORED_EVERYWHERE,
    REQUIRED,
    TOKEN_IDS,
    WITHOUT_KEY_EVERYWHERE,
    Architecture,
    IfTensorPresent,
    Ignored,
    Mapped,
    RequiredValue,
    SupportedValues,
    TrainingOnly,
)
from pretrain.objectives import OBJECTIVES
from pretrain.objectives.objective import END_OF_TEXT_ROLE

_ABSENT = object()


@dataclass
class ImportedConfig:
    """The content of a config.json in our terms.

    Attributes:
        model: our config; None when there are problems.
        problems: values that have no counterpart here.
        notes: values that an import drops, because they act in training only.
        token_ids: ids of special tokens, by their key in config.json.
    """

    model: FamilyConfig | None = None
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    token_ids: dict[str, Any] = field(default_factory=dict)


def by_model_type() -> dict[str, tuple[str, Architecture]]:
    """(family, architecture) of every model_type that can be imported."""
    return {found.model_type: (family, found) for family in FAMILIES for found in architectures(family)}


# -- import ------------------------------------------------------------------------------------------------------------


def read_config(family: str, architecture: Architecture, values: dict[str, Any], tensors: Collection[str]
                ) -> ImportedConfig:
    """Our config from the values of config.json and the names of the tensors beside it."""
    values = architecture.read(values)
    section = values.get(architecture.tokens_in, {}) if architecture.tokens_in else values
    found = ImportedConfig(token_ids={key: section[key] for key in TOKEN_IDS if section.get(key) is not None})
    ours: dict[str, Any] = {"family": family}
    source: dict[str, str] = {}
    known: set[str] = set()
    for rule in architecture.fields:
        if isinstance(rule, Ignored):
            known |= set(rule.theirs)
        elif isinstance(rule, SupportedValues):
            if not rule.implied:
                ours[rule.ours] = rule.values[0]
        elif isinstance(rule, IfTensorPresent):
            ours[rule.ours] = rule.tensor in tensors
        else:
            known.add(rule.theirs)
            value = _at(values, rule.theirs, getattr(rule, "default", _ABSENT))
            _take(rule, value, ours, source, found=found)
    found.problems += [_unknown(key) for key in sorted(_keys(values, known) - known)]
    if not found.problems:
        found.model, problems = _model(family, ours, source)
        found.problems += problems
    return found


def _take(rule: Mapped | RequiredValue | TrainingOnly, value: Any, ours: dict[str, Any], source: dict[str, str], *,
          found: ImportedConfig) -> None:
    """Turn one transformers key into a value of ours, a note or a problem. `source`: the key of each of our values."""
    if value is REQUIRED:
        found.problems.append(Problem(rule.theirs, "nothing", "a value", f"add {rule.theirs} to config.json"))
    elif isinstance(rule, TrainingOnly):
        if value is not _ABSENT and value != rule.value:
            found.notes.append(f"{rule.theirs}={value!r} is dropped: training here has no such setting")
    elif isinstance(rule, RequiredValue):
        if value != rule.value:
            found.problems.append(Problem(rule.theirs, repr(value), repr(rule.value), rule.change))
    else:
        mine = next((mine for mine, theirs in rule.words if theirs == value), _ABSENT if rule.words else value)
        if mine is _ABSENT:
            found.problems.append(Problem(rule.theirs, repr(value), ", ".join(repr(theirs) for _, theirs in rule.words),
                                         "take a model with one of these"))
            return
        if rule.ours in source and ours[rule.ours] != mine:
            found.problems.append(Problem(rule.theirs,
                                          f"{value!r}, while {source[rule.ours]} gives {ours[rule.ours]!r}",
                                          f"one value: here both are model.{rule.ours}",
                                          "take a model where they are equal"))
            return
        ours[rule.ours], source[rule.ours] = mine, rule.theirs


def _model(family: str, ours: dict[str, Any], source: dict[str, str]) -> tuple[FamilyConfig | None, list[Problem]]:
    """The config with these values, or problems that name the keys of config.json."""
    spec = family_spec(family)
    for name, cls_field in spec.config_class.model_fields.items():
        if cls_field.annotation is float and isinstance(ours.get(name), int):
            ours[name] = float(ours[name])
    try:
        model = spec.config_class.model_validate(ours)
    except ValidationError as error:
        return None, [Problem(source.get(str(detail["loc"][0]), str(detail["loc"][0])), repr(detail["input"]),
                              detail["msg"].removeprefix("Input should be "),
                              "correct config.json, or take another model")
                      for detail in error.errors()]
    return model, [Problem(f"{where} ({source[where.removeprefix('model.')]})"
                           if where.removeprefix("model.") in source else where, *found)
                   for where, *found in spec.problems(model)]


def _unknown(key: str) -> Problem:
    return Problem(key, "a key that is not known here", "keys whose meaning is known, so that none is skipped",
                   f"delete {key} from config.json if the model computes the same without it")


def _keys(values: dict[str, Any], known: Collection[str]) -> set[str]:
    """Dotted keys that the outputs may depend on; a section that `known` has keys of is split into its own keys."""
    sections = {key.partition(".")[0] for key in known if "." in key}
    found = set()
    for key, value in values.items():
        if key in sections and isinstance(value, dict):
            found |= {f"{key}.{inner}" for inner, content in value.items() if not _is_ignored(inner, content)}
        elif key not in sections and not _is_ignored(key, value):
            found.add(key)
    return found


def _is_ignored(key: str, value: Any) -> bool:
    """Whether a key changes no output of any architecture; so does a switch of a part that is off."""
    return key in IGNORED_EVERYWHERE or (key in ("is_decoder", "is_encoder_decoder", "add_cross_attention",
                                              "cross_attention_hidden_size", "pruned_heads", "tie_encoder_decoder")
                                      and not value)


def _at(values: dict[str, Any], key: str, default: Any) -> Any:
    place: Any = values
    for part in key.split("."):
        if not isinstance(place, dict) or part not in place:
            return default
        place = place[part]
    return place


# -- export ------------------------------------------------------------------------------------------------------------


def choose_architecture(family: str, model: FamilyConfig, asked: str | None) -> tuple[Architecture, list[Problem]]:
    """The architecture with the model_type `asked`, else the first that fits, with the problems that remain.

    Raises:
        LookupError: the family has no such architecture; the message names those it has.
    """
    known = architectures(family)
    if asked is not None:
        known = tuple(found for found in known if found.model_type == asked)
    if not known:
        names = ", ".join(found.model_type for found in architectures(family)) or "none"
        raise LookupError(names)
    judged = [(found, list(misfits(found, model))) for found in known]
    return min(judged, key=lambda pair: len(pair[1]))  # the first of those with fewest problems


def misfits(architecture: Architecture, model: FamilyConfig) -> Iterator[Problem]:
    """Values of our config that this architecture has no counterpart for."""
    mapped: set[str] = set()
    for rule in architecture.fields:
        if isinstance(rule, SupportedValues):
            value = _ours(rule, model)
            if value not in rule.values:
                shown = getattr(model, rule.ours)
                yield Problem(f"model.{rule.ours}", f"{shown!r} in {architecture.model_type}",
                              ", ".join(map(str, rule.values)) if not rule.implied else "what that architecture has",
                              "keep the model in Trainyard's format: transformers' class has no such part")
        elif isinstance(rule, Mapped) and rule.words:
            value = _ours(rule, model)
            if value not in [mine for mine, _ in rule.words]:
                yield Problem(f"model.{rule.ours}", f"{value!r} in {architecture.model_type}",
                              ", ".join(sorted({str(mine) for mine, _ in rule.words})),
                              "keep the model in Trainyard's format: transformers' class has no such part")
        mapped.add(getattr(rule, "ours", ""))
    left = set(type(model).model_fields) - mapped - {*architecture.without_key, *WITHOUT_KEY_EVERYWHERE}
    if left:
        raise LookupError(f"the name map of {architecture.model_type} has no rule for {sorted(left)}")


def write_config(architecture: Architecture, model: FamilyConfig, token_ids: dict[str, Any], dtype: str
                 ) -> dict[str, Any]:
    """The content of config.json for a model that fits."""
    values: dict[str, Any] = {}
    for rule in architecture.fields:
        if isinstance(rule, Mapped):
            value = _ours(rule, model)
            _put(values, rule.theirs, next((theirs for mine, theirs in rule.words if mine == value), value))
        elif isinstance(rule, RequiredValue) and not (rule.value is None and rule.default is None):
            _put(values, rule.theirs, rule.value)
    for key, value in token_ids.items():
        _put(values, f"{architecture.tokens_in}.{key}".removeprefix("."), value)
    return {"architectures": [architecture.class_name(model)], "model_type": architecture.model_type,
            **architecture.write(values), "dtype": dtype}


def _ours(rule: Mapped | SupportedValues, model: FamilyConfig) -> Any:
    return rule.value(model) if rule.value else getattr(model, rule.ours)


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
    values[name] = value


def token_ids_of(config: RunConfig, end_of_text: int) -> dict[str, int | None]:
    """The token ids in config.json, as the objective of a run here uses them."""
    special = SpecialIds.at_top(config.model.vocab_size)
    role = OBJECTIVES[config.objective.name].special.decoder_start
    decoder_start = end_of_text if role == END_OF_TEXT_ROLE else getattr(special, role)
    return hf_adapter(config.model.family).config_token_ids(special, end_of_text, decoder_start)
