"""`model.freeze`: which parameters its patterns match, and layers that are built with those frozen.

The names of parameters are known once the layers are built (on the device `meta`, which takes no memory), so a pattern
is checked there and not before torch is imported: a list of names beside the layers would be a second description of
every family.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial

import torch
from torch import nn

from common.errors import ConfigError, Problem
from common.wording import nearest
from parallel.parameter_plan import freeze, plan_of
from parallel.pipeline_stages import LayerSpec
from pretrain.models.build import build_stage
from pretrain.models.family import FamilyConfig

KEY = "model.freeze"


def frozen_layers(specs: Sequence[LayerSpec], patterns: Sequence[str]) -> list[LayerSpec]:
    """The layers, each built with the parameters frozen whose global name matches a pattern."""
    return [replace(spec, build=partial(_build, spec, patterns)) for spec in specs] if patterns else list(specs)


def _build(spec: LayerSpec, patterns: Sequence[str]) -> nn.Module:
    module = spec.build()
    for name, parameter in module.named_parameters():
        # of a stack `check_freeze` has found that all names match or none
        if _matches(_global_names(f"{spec.name}.{name}", parameter)[0], patterns):
            freeze(parameter)
    return module


def check_freeze(model: FamilyConfig) -> None:
    """Check the patterns of `model.freeze` against the names of the whole model; the same on every rank.

    Raises:
        ConfigError: a pattern matches nothing, or a part of the experts that one layer stacks in one tensor; or all
            parameters would be frozen.
    """
    if not model.freeze:
        return
    stage = build_stage(model, None, torch.device("meta"))
    by_parameter = [tuple(_global_names(name, parameter)) for name, parameter in stage.named_global_parameters()]
    problems = list(_problems(model.freeze, by_parameter))
    if problems:
        raise ConfigError(problems, "the model that this config describes")


def _global_names(name: str, parameter: nn.Parameter) -> tuple[str, ...]:
    stack = plan_of(parameter).stack
    return stack.names(name) if stack else (name,)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _problems(patterns: Sequence[str], by_parameter: Sequence[tuple[str, ...]]) -> Iterator[Problem]:
    """What is wrong with the patterns; `by_parameter` has the global names of the tensors in each parameter."""
    names = [name for names in by_parameter for name in names]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = _near(pattern, names)
            yield Problem(KEY, f"{pattern!r}, which matches no parameter", f"patterns of names such as {_some(names)}",
                          f"did you mean {near!r}?" if near else f"correct the pattern, or take it out of {KEY}")
    for stacked in by_parameter:
        frozen = [name for name in stacked if _matches(name, patterns)]
        if 0 < len(frozen) < len(stacked):
            whole = stacked[0].replace(".experts.0.", ".experts.*.")
            yield Problem(KEY, f"{len(frozen)} of {len(stacked)} experts of {whole}", "all experts of a layer or none: "
                          "they are one stacked tensor with one gradient",
                          f"write {whole!r} to freeze all of them, or take the pattern of {frozen[0]} out")
    if all(_matches(name, patterns) for name in names):
        yield Problem(KEY, "all parameters", "at least one parameter that is trained",
                      "take a pattern out, or use `trainyard evaluate` to measure the model as it is")


def _some(names: Sequence[str], count: int = 3) -> str:
    return ", ".join(names[:: max(1, len(names) // count)][:count])


def _near(pattern: str, names: Sequence[str]) -> str | None:
    """The name, or the pattern of all names with a common beginning, that is most like `pattern`."""
    known = dict.fromkeys(names)
    for name in names:
        parts = name.split(".")
        known |= dict.fromkeys(".".join(parts[:end]) + ".*" for end in range(1, len(parts)))
    return nearest(pattern, list(known))
