"""Between a model's config and a transformers config.json, with everything that one of them cannot say (no torch)."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from common.errors import Problem
from data_pipeline.corruption.special_ids import SpecialIds
from pretrain.config.run_config import RunConfig
from pretrain.models import FAMILIES, architectures, family_spec
from pretrain.models.family import FamilyConfig
from pretrain.models.hf_map import (
    FREE_EVERYWHERE,
    REQUIRED,
    TOKEN_IDS,
    Architecture,
    IfTensorPresent,
    Ignored,
    Mapped,
    RequiredValue,
    SupportedValues,
    TrainingOnly,
)

_ABSENT = object()


@dataclass
class Read:
    """What a config.json says: our config, or problems; and what it says beside that."""

    model: FamilyConfig | None = None
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    token_ids: dict[str, Any] = field(default_factory=dict)


def by_model_type() -> dict[str, tuple[str, Architecture]]:
    """(family, architecture) of every model_type that is known here."""
    return {found.model_type: (family, found) for family in FAMILIES for found in architectures(family)}


# -- from theirs -------------------------------------------------------------------------------------------------------


def read_config(family: str, architecture: Architecture, values: dict[str, Any], tensors: Collection[str]) -> Read:
    """Our config from the values of config.json and the names of the tensors beside it."""
    spelt = architecture.read(values)
    named = spelt.get(architecture.tokens_in) if architecture.tokens_in else spelt
    told = Read(token_ids={key: named[key] for key in TOKEN_IDS if named.get(key) is not None})
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
            value = _at(spelt, rule.theirs, getattr(rule, "default", _ABSENT))
            _take(rule, value, ours, source, told)
    told.problems += [_unknown(key) for key in sorted(_keys(spelt, known) - known)]
    if not told.problems:
        told.model, problems = _model(family, ours, source)
        told.problems += problems
    return told


def _take(rule: Mapped | RequiredValue | TrainingOnly, value: Any, ours: dict[str, Any], source: dict[str, str],
          told: Read) -> None:
    """One key of theirs, into our values, a note or a problem."""
    if value is REQUIRED:
        told.problems.append(Problem(rule.theirs, "nothing", "a value", f"add {rule.theirs} to config.json"))
    elif isinstance(rule, TrainingOnly):
        if value is not _ABSENT and value != rule.value:
            told.notes.append(f"{rule.theirs}={value!r} is not carried over: training here has nothing like it")
    elif isinstance(rule, RequiredValue):
        if value != rule.value:
            told.problems.append(Problem(rule.theirs, repr(value), repr(rule.value), rule.change))
    else:
        mine = next((mine for mine, theirs in rule.words if theirs == value), _ABSENT if rule.words else value)
        if mine is _ABSENT:
            told.problems.append(Problem(rule.theirs, repr(value), ", ".join(repr(theirs) for _, theirs in rule.words),
                                         "take a model with one of these"))
            return
        if rule.ours in source and ours[rule.ours] != mine:
            told.problems.append(Problem(rule.theirs, f"{value!r}, while {source[rule.ours]} gives {ours[rule.ours]!r}",
                                         f"one value: here both are model.{rule.ours}",
                                         "take a model where they are equal"))
            return
        ours[rule.ours], source[rule.ours] = mine, rule.theirs


def _model(family: str, ours: dict[str, Any], source: dict[str, str]) -> tuple[FamilyConfig | None, list[Problem]]:
    """The config that these values make, or what is wrong with them under the names of config.json."""
    spec = family_spec(family)
    for name, cls_field in spec.config_class.model_fields.items():
        if cls_field.annotation is float and isinstance(ours.get(name), int):
            ours[name] = float(ours[name])
    try:
        model = spec.config_class.model_validate(ours)
    except ValidationError as error:
        return None, [Problem(source.get(str(detail["loc"][0]), str(detail["loc"][0])), repr(detail["input"]),
                              detail["msg"].removeprefix("Input should be "), "mend config.json, or take another model")
                      for detail in error.errors()]
    return model, [Problem(f"{where} ({source[where.removeprefix('model.')]})"
                           if where.removeprefix("model.") in source else where, *found)
                   for where, *found in spec.problems(model)]


def _unknown(key: str) -> Problem:
    return Problem(key, "a key that is not known here", "keys whose meaning is known, so that none is passed over",
                   f"delete {key} from config.json if the model computes the same without it")


def _keys(values: dict[str, Any], known: Collection[str]) -> set[str]:
    """Dotted keys that a model may depend on; inside the sections that `known` looks into, those of the section."""
    sections = {key.partition(".")[0] for key in known if "." in key}
    found = set()
    for key, value in values.items():
        if key in sections and isinstance(value, dict):
            found |= {f"{key}.{inner}" for inner, content in value.items() if not _free(inner, content)}
        elif key not in sections and not _free(key, value):
            found.add(key)
    return found


def _free(key: str, value: Any) -> bool:
    """Whether a key has no bearing anywhere; switches of parts that are off count as well."""
    return key in FREE_EVERYWHERE or (key in ("is_decoder", "is_encoder_decoder", "add_cross_attention",
                                              "cross_attention_hidden_size", "pruned_heads", "tie_encoder_decoder")
                                      and not value)


def _at(values: dict[str, Any], key: str, default: Any) -> Any:
    place: Any = values
    for part in key.split("."):
        if not isinstance(place, dict) or part not in place:
            return default
        place = place[part]
    return place


# -- to theirs ---------------------------------------------------------------------------------------------------------


def choose_architecture(family: str, model: FamilyConfig, asked: str | None) -> tuple[Architecture, list[Problem]]:
    """The architecture asked for, or else the first that fits; with what keeps it from fitting.

    Raises:
        LookupError: `asked` is not one of the family's; the message names those.
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
    """What of our config this architecture cannot say."""
    said: dict[str, Any] = {}
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
        said[getattr(rule, "ours", "")] = True
    # `freeze` says what is trained and nothing of the model itself
    silent = set(type(model).model_fields) - set(said) - {*architecture.free_of_ours, "freeze"}
    if silent:
        raise LookupError(f"the map of {architecture.model_type} does not say what becomes of {sorted(silent)}")


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


def token_ids_of(config: RunConfig, end_of_text: int) -> dict[str, int]:
    """The ids that config.json names, as the objective of a run here uses them."""
    special, form = SpecialIds(config.model.vocab_size), config.spec.form
    if form == "decoder":
        return {"bos_token_id": end_of_text, "eos_token_id": end_of_text}
    if form == "encoder":
        return {"bos_token_id": special.start, "eos_token_id": special.separator, "pad_token_id": special.pad}
    if form == "dual_encoder":
        return {"eos_token_id": end_of_text}
    # The decoder's first input: end-of-text where a damaged sample is restored, else padding.
    first = end_of_text if config.objective.name == "denoising" else special.pad
    return {"bos_token_id": special.start, "eos_token_id": end_of_text, "pad_token_id": special.pad,
            "decoder_start_token_id": first}
