"""What is wrong between the sections of a config, all at once (no torch)."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from pydantic import BaseModel

from common.errors import Problem
from data_pipeline.config import DataConfig
from data_pipeline.config import problems as data_problems
from parallel.config import ParallelConfig, PrecisionConfig
from parallel.rules import table as rules
from pretrain.checkpoint.start_weights import start_folder, start_problems
from pretrain.config.config_file import shown
from pretrain.config.sections import CheckpointSection, LogSection, RunSection
from pretrain.models import FAMILIES, family_spec
from pretrain.models.family import FamilyConfig
from pretrain.objectives import OBJECTIVES
from pretrain.objectives.objective import ObjectiveConfig


def problems_between(sections: dict[str, BaseModel], world_size: int | None) -> Iterator[Problem]:
    """Runs every check whose sections are there."""
    for needed, check in _CHECKS:
        if all(name in sections for name in needed):
            yield from (Problem(*found) for found in check(*(sections[name] for name in needed), world_size))


def _model_problems(model: FamilyConfig, world_size: int | None) -> Iterator[rules.Found]:
    return family_spec(model.family).problems(model)


def _layout_problems(parallel: ParallelConfig, precision: PrecisionConfig, model: FamilyConfig,
                     world_size: int | None) -> Iterator[rules.Found]:
    return rules.problems(parallel, precision, world_size, family_spec(model.family).traits(model))


def _objective_problems(objective: ObjectiveConfig, model: FamilyConfig, world_size: int | None
                        ) -> Iterator[rules.Found]:
    names = family_spec(model.family).objectives
    if objective.name not in names:
        able = [name for name in FAMILIES if objective.name in family_spec(name).objectives]
        yield ("objective.name", f"{objective.name} with model.family={model.family}", ", ".join(names),
               f"set objective.name={names[0]}, or model.family={able[0]}")
    else:
        yield from OBJECTIVES[objective.name].problems(objective, model)


def _data_problems(data: DataConfig, objective: ObjectiveConfig, model: FamilyConfig, world_size: int | None
                   ) -> Iterator[rules.Found]:
    family, spec = family_spec(model.family), OBJECTIVES[objective.name]
    if objective.name not in family.objectives:
        return iter(())
    return iter(data_problems(data, spec.window_tokens(objective, model), model.vocab_size,
                              spec.reserved_ids(objective, model), family.reads))


def _evaluation_problems(log: LogSection, data: DataConfig, world_size: int | None) -> Iterator[rules.Found]:
    if log.evaluate_every and data.heldout is None:
        yield ("log.evaluate_every", f"an evaluation every {log.evaluate_every} steps without held-out data",
               "evaluations of the dataset that data.heldout names", "set data.heldout, or log.evaluate_every=0")


def _start_problems(run: RunSection, checkpoint: CheckpointSection, model: FamilyConfig, world_size: int | None
                    ) -> Iterator[rules.Found]:
    """A run that has checkpoints of its own goes on from those."""
    if checkpoint.start_from is not None and start_folder(run.dir) is None:
        yield from start_problems(checkpoint.start_from, model)


def _folder_problems(run: RunSection, world_size: int | None) -> Iterator[rules.Found]:
    """The run folder must be writable, or its nearest existing parent must let it be made."""
    folder = Path(run.dir).absolute()
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            folder.stat()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        yield "run.dir", f"{shown(run.dir)}: {reason}", "a path this user can reach here", "choose another run.dir"
        return
    nearest_existing = next(place for place in (folder, *folder.parents) if place.exists())
    if not nearest_existing.is_dir():
        yield ("run.dir", f"{run.dir}, where {nearest_existing} is a file", "a folder, new or existing",
               "choose another run.dir, or move the file away")
    elif not os.access(nearest_existing, os.W_OK | os.X_OK):
        yield ("run.dir", f"{run.dir}, inside {nearest_existing}, which this user may not write to",
               "a folder this user may write to", "choose another run.dir, or have its permissions changed")


_CHECKS: tuple[tuple[tuple[str, ...], Callable[..., Iterator[rules.Found]]], ...] = (
    (("run",), _folder_problems),
    (("model",), _model_problems),
    (("objective", "model"), _objective_problems),
    (("data", "objective", "model"), _data_problems),
    (("log", "data"), _evaluation_problems),
    (("run", "checkpoint", "model"), _start_problems),
    (("parallel", "precision", "model"), _layout_problems),
)
