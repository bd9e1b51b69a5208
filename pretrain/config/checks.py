"""What is wrong between the sections of a config, all at once (no torch)."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from pydantic import BaseModel

from common.errors import Problem
from common.files import nearest_existing
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
    """What the sections that are there contradict each other in, on `world_size` ranks (None: not known). Pure."""
    yield from _found(_CHECKS, sections)
    parallel, precision, model = (sections.get(name) for name in ("parallel", "precision", "model"))
    if isinstance(parallel, ParallelConfig) and isinstance(precision, PrecisionConfig) \
            and isinstance(model, FamilyConfig):
        yield from rules.problems(parallel, precision, world_size, family_spec(model.family).traits(model))


def machine_problems(sections: dict[str, BaseModel]) -> Iterator[Problem]:
    """What keeps the run from starting on this machine: its folder, its datasets, the weights it starts from."""
    yield from _found(_MACHINE_CHECKS, sections)


def _found(checks: "Checks", sections: dict[str, BaseModel]) -> Iterator[Problem]:
    """Runs every check whose sections are there."""
    for needed, check in checks:
        if all(name in sections for name in needed):
            yield from check(*(sections[name] for name in needed))


def _model_problems(model: FamilyConfig) -> Iterator[Problem]:
    yield from family_spec(model.family).problems(model)


def _objective_problems(objective: ObjectiveConfig, model: FamilyConfig) -> Iterator[Problem]:
    names = family_spec(model.family).objectives
    if objective.name not in names:
        able = [name for name in FAMILIES if objective.name in family_spec(name).objectives]
        yield Problem("objective.name", f"{objective.name} with model.family={model.family}", ", ".join(names),
                      f"set objective.name={names[0]}, or model.family={able[0]}")
    else:
        yield from OBJECTIVES[objective.name].problems(objective, model)


def _evaluation_problems(log: LogSection, data: DataConfig) -> Iterator[Problem]:
    if log.evaluate_every and data.heldout is None:
        yield Problem("log.evaluate_every", f"an evaluation every {log.evaluate_every} steps without held-out data",
                      "evaluations of the dataset that data.heldout names", "set data.heldout, or log.evaluate_every=0")


def _data_problems(data: DataConfig, objective: ObjectiveConfig, model: FamilyConfig) -> Iterator[Problem]:
    family, spec = family_spec(model.family), OBJECTIVES[objective.name]
    if objective.name in family.objectives:
        yield from data_problems(data, spec.window_tokens(objective, model), model.vocab_size,
                                 reserved_ids=spec.reserved_ids(objective, model), reads=family.reads)


def _start_problems(run: RunSection, checkpoint: CheckpointSection, model: FamilyConfig) -> Iterator[Problem]:
    """A run that has checkpoints of its own goes on from those."""
    if checkpoint.start_from is not None and start_folder(run.dir) is None:
        yield from start_problems(checkpoint.start_from, model)


def _folder_problems(run: RunSection) -> Iterator[Problem]:
    """The run folder must be writable, or its nearest existing parent must let it be made."""
    folder = Path(run.dir).absolute()
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            folder.stat()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        yield Problem("run.dir", f"{shown(run.dir)}: {reason}", "a path this user can reach here",
                      "choose another run.dir")
        return
    place = nearest_existing(folder)
    if not place.is_dir():
        yield Problem("run.dir", f"{run.dir}, where {place} is a file", "a folder, new or existing",
                      "choose another run.dir, or move the file away")
    elif not os.access(place, os.W_OK | os.X_OK):
        yield Problem("run.dir", f"{run.dir}, inside {place}, which this user may not write to",
                      "a folder this user may write to", "choose another run.dir, or have its permissions changed")


Checks = tuple[tuple[tuple[str, ...], Callable[..., Iterator[Problem]]], ...]

_CHECKS: Checks = (
    (("model",), _model_problems),
    (("objective", "model"), _objective_problems),
    (("log", "data"), _evaluation_problems),
)
_MACHINE_CHECKS: Checks = (
    (("run",), _folder_problems),
    (("data", "objective", "model"), _data_problems),
    (("run", "checkpoint", "model"), _start_problems),
)
