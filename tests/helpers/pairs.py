"""All pairs of option values: which of them the parity suite trains, which the rules refuse, and which are neither.

The options are the fields of `parallel` and `precision` as their classes declare them, the data degree and the number
of micro-batches that follow from them, and what models and objectives differ in. A new field is met by the walk at
once: a choice or a switch with all its values, any other with those that VALUES gives it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import combinations, pairwise, product
from typing import Any, Literal, NamedTuple, get_args, get_origin

from common.errors import ConfigError, Problem
from parallel.config import ParallelConfig, PrecisionConfig
from parallel.layout import Layout
from parallel.pipeline_stages import cut
from pretrain.config.config_file import RawConfig, apply_overrides
from pretrain.config.run_config import RunConfig, config_from
from pretrain.models import FAMILIES, family_spec
from pretrain.models.build import layer_list
from pretrain.objectives import OBJECTIVES
from tests.helpers.recipes import recipe_of

# Fields whose type does not list their values: the value that does nothing, then what does something.
VALUES: dict[str, tuple] = {
    "parallel.tensor": (1, 2), "parallel.pipeline": (1, 2), "parallel.context": (1, 2), "parallel.expert": (1, 2),
    "parallel.zero_stage": (0, 1, 2, 3), "parallel.loss_chunk_tokens": (0, 24), "parallel.recompute_every": (1, 2),
}  # fmt: skip
# Fields that only say how much, or where: nothing works otherwise with another amount or place.
AMOUNTS = {"parallel.micro_batch", "parallel.global_batch", "parallel.offload_folder", "precision.initial_scale_power",
           "precision.scale_window"}
MODEL_VALUES: dict[str, tuple] = {
    "model.family": tuple(FAMILIES), "objective.name": tuple(OBJECTIVES), "model.tied_head": (True, False),
    "model.experts": (0, 4),
}  # fmt: skip
ENCODER_DECODERS = tuple(name for name in FAMILIES if family_spec(name).form == "encoder_decoder")
DATA, MICRO_BATCHES = "data degree", "micro-batches"  # they follow from other fields and from the number of ranks
ASSIGNMENT = re.compile(r"\b((?:parallel|precision|model|objective)\.[a-z_]+)"
                        r"(?:=| to (?:one of |a multiple of )?)([A-Za-z0-9_.]+)")
RANKS = re.compile(r"\bstart (\d+)")
MAX_REMEDIES = 8

Choices = dict[str, Any]  # option: value
Pair = tuple[tuple[str, Any], tuple[str, Any]]


class Verdict(NamedTuple):
    """`kind` is legal, refused, void (the family has no such option) or wrong (a refusal without a remedy that helps).
    `choices` are those that make the pair legal, or that the refusal is about."""

    kind: str
    choices: Choices
    words: str = ""


def options() -> dict[str, tuple]:
    """Every option with its values. Raises LookupError for a field that the walk knows nothing of."""
    found = {}
    for section, config_class in (("parallel", ParallelConfig), ("precision", PrecisionConfig)):
        for name, field in config_class.model_fields.items():
            key = f"{section}.{name}"
            values = VALUES.get(key) or _listed(field.annotation)
            if key not in AMOUNTS:
                if values is None:
                    raise LookupError(f"{key} is new: give it values in tests/helpers/pairs.py, or call it an amount")
                found[key] = values
    return {**found, DATA: (1, 2), MICRO_BATCHES: (1, 4), **MODEL_VALUES}


def all_pairs() -> Iterator[Pair]:
    for (first, values), (second, others) in combinations(options().items(), 2):
        yield from (((first, value), (second, other)) for value, other in product(values, others))


def trained_values(record: Mapping[str, Any]) -> Choices:
    """Every option's declared value in a run: its config as plain values, and `world_size`."""
    parallel = ParallelConfig(**record["parallel"])
    data = Layout.of(parallel, record["world_size"]).data
    found = {DATA: data, MICRO_BATCHES: parallel.global_batch // (parallel.micro_batch * data)}
    for key in options():
        section, _, name = key.partition(".")
        if name and name in record[section]:
            found[key] = record[section][name]
    return {key: _class_of(values, found[key]) for key, values in options().items() if key in found}


def trained_pairs(record: Mapping[str, Any]) -> set[Pair]:
    """The pairs that occur together in a run."""
    return set(combinations(trained_values(record).items(), 2))


def boundary_pairs() -> Iterator[tuple[str, Any]]:
    """Every option value that can go with experts and a pipeline of an encoder-decoder: at a boundary inside the
    decoder two real tensors cross, and both lead back to the routers of the encoder.
    """
    for key, values in options().items():
        yield from ((key, value) for value in values if any(_meets_experts(key, value, family)
                                                            for family in ENCODER_DECODERS))


def _meets_experts(key: str, value: Any, family: str) -> bool:
    choices = {"model.family": family, "model.experts": 4, "parallel.pipeline": 2}
    return choices.get(key, value) == value and judge(tuple({**choices, key: value}.items())).kind == "legal"


def crosses_two_tensors(record: Mapping[str, Any]) -> bool:
    """Whether a boundary between two stages of a run lies inside a decoder that has an encoder before it: the decoder's
    activations and the encoder's output cross it.
    """
    config = config_from({name: record[name] for name in RunConfig.model_fields}, "record")
    if config.model.family not in ENCODER_DECODERS:
        return False
    specs = layer_list(config.model, None, config.num_predictions)
    bounds = cut([spec.cost for spec in specs], config.parallel.num_stages, [spec.with_next for spec in specs])
    inside = [spec.name.startswith("decoder.") and not spec.name.endswith("final_norm") for spec in specs]
    return any(inside[before] and inside[after] for before, after in pairwise(range(len(specs))) if after in bounds)


def judge(pair: tuple[tuple[str, Any], ...]) -> Verdict:
    """Tries the pair (or more choices) with everything else as usual. Where rules refuse that, follows a remedy that
    leaves the pair alone; where every remedy changes the pair, it is refused, and the remedy has to clear the refusal.
    """
    choices, names_own_change = dict(pair), False
    for _ in range(MAX_REMEDIES):
        found = problems(choices)
        if not found:
            return Verdict("legal", choices)
        steps = []
        for problem in found:
            remedies = list(_remedies(problem, choices))
            if not remedies:
                return Verdict("void" if "the unknown name" in problem.asked else "wrong", choices,
                               f"{problem.where}: no change is named: {problem.change}")
            helpful = [(key, value) for key, value in remedies
                       if not any((other.where, other.possible) == (problem.where, problem.possible)
                                  for other in problems({**choices, key: value}))]
            names_own_change |= any(key in dict(pair) for key, _ in helpful)
            # What another remedy has set stays: two that undo each other leave only a change of the pair.
            steps.append([(key, value) for key, value in helpful if key not in choices])
            if not steps[-1]:
                return Verdict("refused" if names_own_change else "wrong", choices,
                               f"{problem.where}: {problem.change}")
        choices |= steps[0][:1]
    return Verdict("wrong", choices, f"{MAX_REMEDIES} remedies did not make it legal")


def problems(choices: Choices) -> list[Problem]:
    """What keeps a run with these choices from being trained, but for data and folders."""
    try:
        config = config_of(choices)
    except ConfigError as error:
        return error.problems
    return config.problems(world_size_of(config, choices))


def config_of(choices: Choices) -> RunConfig:
    raw = RawConfig("pairs")
    raw.values = copy.deepcopy({**recipe_of(_family(choices)), "data": {"train": "none"}})
    apply_overrides(raw, overrides(choices))
    return config_from(raw.values, "pairs")


def overrides(choices: Choices) -> list[str]:
    """The choices as words of a command line."""
    usual = _global_batch(choices)
    micro_batch = usual // (choices.get(DATA, 1) * choices.get(MICRO_BATCHES, 1))
    words = [f"parallel.global_batch={usual}", f"parallel.micro_batch={micro_batch}"]
    return words + [f"{key}={_written(value)}" for key, value in choices.items() if "." in key]


def _global_batch(choices: Choices) -> int:
    return recipe_of(_family(choices))["parallel"]["global_batch"]


def world_size_of(config: RunConfig, choices: Choices) -> int:
    return config.parallel.model_ranks * choices.get(DATA, 1)


def _family(choices: Choices) -> str:
    """The family chosen, else the first one that has the objective chosen."""
    objective = choices.get("objective.name")
    able = [name for name in FAMILIES if objective is None or objective in family_spec(name).objectives]
    return choices.get("model.family", able[0])


def _remedies(problem: Problem, choices: Choices) -> Iterable[tuple[str, Any]]:
    """(option, value) for each change that a problem names."""
    known = options()
    for key, text in ASSIGNMENT.findall(problem.change):
        if key == "parallel.micro_batch" and text.isdigit():
            yield MICRO_BATCHES, _global_batch(choices) // (choices.get(DATA, 1) * int(text))
        if key == "parallel.global_batch" and text.isdigit():  # as many more micro-batches of the same size
            yield MICRO_BATCHES, choices.get(MICRO_BATCHES, 1) * int(text) // _global_batch(choices)
        if key in AMOUNTS:
            continue
        meant = [value for value in known.get(key, (text,)) if _written(value) == text]
        if meant or text.isdigit():
            yield key, meant[0] if meant else int(text)
    for ranks in RANKS.findall(problem.change):
        model_ranks = world_size_of(config_of(choices), {})
        if int(ranks) % model_ranks == 0:
            yield DATA, int(ranks) // model_ranks


def _listed(annotation: Any) -> tuple | None:
    """All values of a switch or a choice."""
    if annotation is bool:
        return (False, True)
    return get_args(annotation) if get_origin(annotation) is Literal else None


def _class_of(values: tuple, value: Any) -> Any:
    """The declared value that stands for this one: any other amount stands with the last."""
    return value if value in values else values[-1]


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
