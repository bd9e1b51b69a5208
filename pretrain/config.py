"""One run, as its YAML file describes it: the sections, and everything that is wrong with them at once (no torch)."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field, SerializeAsAny, ValidationError, ValidationInfo, field_validator

from data_pipeline.config import DataConfig
from data_pipeline.config import problems as data_problems
from parallel import rules
from parallel.config import STRICT, ParallelConfig, PrecisionConfig
from pretrain.checkpoint.start import start_folder, start_problems
from pretrain.config_file import RawConfig, apply_overrides, dump, nearest, read_config_file, shown
from pretrain.errors import ConfigError, Problem
from pretrain.models import FAMILIES, family_spec
from pretrain.models.family import FamilyConfig, FamilySpec
from pretrain.objectives import OBJECTIVES
from pretrain.objectives.objective import ObjectiveConfig, ObjectiveSpec


class Section(BaseModel):
    """A part of the config that knows nothing of the others."""

    model_config = STRICT


class RunSection(Section):
    """The run itself."""

    dir: str = Field(min_length=1, description="the run folder, relative to where the command is started")
    seed: int = Field(1234, ge=0, lt=2**63, description="decides the initial weights and the order of the data")
    steps: int = Field(ge=1, description="optimizer steps in the whole run, resumed parts included")
    check_every: int = Field(
        1000, ge=0, description="steps between checks that weights which several ranks hold are the same bit for bit; "
        "0 never checks"
    )


class OptimizerSection(Section):
    """AdamW and the clipping of gradients."""

    lr: float = Field(gt=0, description="peak learning rate")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the mean of gradients")
    beta2: float = Field(0.95, ge=0, lt=1, description="decay of the mean of squared gradients")
    epsilon: float = Field(1e-8, gt=0, description="added to the root of the mean of squared gradients")
    weight_decay: float = Field(0.1, ge=0, description="decoupled decay of matrices; norms and biases have none")
    clip_norm: float = Field(1.0, ge=0, description="largest norm of the whole gradient; 0 does not clip")


class ScheduleSection(Section):
    """The learning rate over the steps."""

    name: Literal["constant", "linear", "cosine", "inverse_sqrt", "wsd"] = Field(
        "cosine", description="shape after warm-up; `wsd` stays at the peak and decays at the end"
    )
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up to the peak")
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="lowest learning rate as a part of the peak")
    decay_steps: int | None = Field(
        None, ge=1, description="step of the lowest rate, null for run.steps; with `wsd` the length of the final decay "
        "in steps, null for a tenth of run.steps"
    )


class CheckpointSection(Section):
    """What is kept of the run's state."""

    every: int = Field(
        1000, ge=0, description="steps between checkpoints, and one at the end; 0: none, but for a request to stop"
    )
    keep: int = Field(2, ge=1, description="newest checkpoints that are kept")
    resume: Literal["auto", "never"] = Field(
        "auto", description="`auto` continues a run folder that has a checkpoint; `never` refuses such a folder"
    )
    start_from: str | None = Field(
        None, min_length=1, description="a run folder or a checkpoint whose weights a new run starts with; its moments "
        "and its position are left behind. null: weights are drawn from run.seed"
    )


class LogSection(Section):
    """What a run tells, and how often."""

    every: int = Field(10, ge=1, description="steps between two lines on the console")
    evaluate_every: int = Field(0, ge=0, description="steps between evaluations on data.heldout; 0 never evaluates")
    evaluate_samples: int = Field(256, ge=1, description="held-out sequences in one evaluation")
    tensorboard: bool = Field(True, description="write TensorBoard files to the run folder")


SECTIONS: dict[str, type[BaseModel]] = {
    "run": RunSection,
    "model": FamilyConfig,  # the fields are those of the family's own class
    "objective": ObjectiveConfig,  # the fields are those of the objective's own class
    "data": DataConfig,
    "parallel": ParallelConfig,
    "precision": PrecisionConfig,
    "optimizer": OptimizerSection,
    "schedule": ScheduleSection,
    "checkpoint": CheckpointSection,
    "log": LogSection,
}

# Sections whose fields depend on one of them: its name, its usual value, all values, and the class for a value.
VARIANTS: dict[str, tuple[str, str | None, Sequence[str], Callable[[str], type[BaseModel]]]] = {
    "model": ("family", "gpt", tuple(FAMILIES), lambda family: family_spec(family).config_class),
    "objective": ("name", None, tuple(OBJECTIVES), lambda name: OBJECTIVES[name].config_class),
}


class RunConfig(Section):
    """Everything a run is made of. Frozen, and exactly what the user wrote plus defaults."""

    run: RunSection
    model: SerializeAsAny[FamilyConfig]
    objective: SerializeAsAny[ObjectiveConfig]
    data: DataConfig
    parallel: ParallelConfig
    precision: PrecisionConfig = PrecisionConfig()
    optimizer: OptimizerSection
    schedule: ScheduleSection = ScheduleSection()
    checkpoint: CheckpointSection = CheckpointSection()
    log: LogSection = LogSection()

    @field_validator(*VARIANTS, mode="before")
    @classmethod
    def _of_its_class(cls, values: object, info: ValidationInfo) -> object:
        """Plain values (of a checkpoint's manifest, say) become the config of their family or objective."""
        key, _, choices, class_of = VARIANTS[info.field_name]
        if isinstance(values, dict) and values.get(key) in choices:
            return class_of(values[key]).model_validate(values)
        return values

    @property
    def spec(self) -> FamilySpec:
        """The facts of the model's family."""
        return family_spec(self.model.family)

    @property
    def objective_spec(self) -> ObjectiveSpec:
        """The facts of the objective."""
        return OBJECTIVES[self.objective.name]

    @property
    def window_tokens(self) -> int:
        """Tokens of text in one sample, before the objective does anything to it."""
        return self.objective_spec.window_tokens(self.objective, self.model)

    def problems(self, world_size: int | None) -> list[Problem]:
        """What keeps this config from running on `world_size` ranks; None leaves out what depends on their number."""
        return list(_problems_between(dict(self), world_size))

    def text(self) -> str:
        """The resolved config as YAML; reading it gives an equal config."""
        return dump(self.model_dump())

    def save(self, path: Path) -> None:
        """Writes the resolved config, aside first, so that a reader never sees half of it."""
        aside = path.with_name(path.name + ".part")
        aside.write_text(self.text(), encoding="utf-8")
        os.replace(aside, path)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a config with `section.key=value` overrides, each section checked for itself.

    Raises ConfigError with all problems. Whether the run can start is another question: `load_run`.
    """
    raw, sections = _read(Path(path), overrides)
    return _config_or_error(raw, sections)


def load_run(path: str | Path, overrides: Sequence[str] = (), world_size: int | None = None) -> RunConfig:
    """Like `load_config`, and checks that the run can start on `world_size` ranks, all in one go.

    Raises ConfigError with the problems of single fields and those between the sections that could be read.
    """
    raw, sections = _read(Path(path), overrides)
    raw.problems.extend(problem._replace(where=raw.located(problem.where))
                        for problem in _problems_between(sections, world_size))
    return _config_or_error(raw, sections)


def config_from(values: dict, source: str) -> RunConfig:
    """A config from values that were written before (a checkpoint's manifest). Raises ConfigError with all problems."""
    raw = RawConfig(source)
    raw.values = values
    return _config_or_error(raw, _sections(raw))


def _config_or_error(raw: RawConfig, sections: dict[str, BaseModel]) -> RunConfig:
    if raw.problems:
        raise ConfigError(raw.problems, raw.source)
    return RunConfig(**sections)


def _read(path: Path, overrides: Sequence[str]) -> tuple[RawConfig, dict[str, BaseModel]]:
    """The values as written, with their problems, and the sections without one."""
    raw = read_config_file(path)
    unreadable = bool(raw.problems) and not raw.values
    apply_overrides(raw, overrides)
    if unreadable:  # every section would be missing: true, and no help
        return raw, {}
    return raw, _sections(raw)


def _sections(raw: RawConfig) -> dict[str, BaseModel]:
    """The sections without a problem; those of the others are noted in `raw`."""
    sections: dict[str, BaseModel] = {}
    for name in raw.values:
        if name not in SECTIONS:
            raw.problems.append(_unknown_key(raw.located(str(name)), str(name), list(SECTIONS), ""))
    for name in SECTIONS:
        section = _section(raw, name)
        if section is not None:
            sections[name] = section
    return sections


def _section(raw: RawConfig, name: str) -> BaseModel | None:
    """One section, or None after noting its problems in `raw`."""
    values = raw.values.get(name)
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raw.problems.append(Problem(raw.located(name), f"{shown(values)} for a whole section", "fields with values",
                                    f"write the fields of {name} on indented lines below it"))
        return None
    cls = SECTIONS[name]
    if name in VARIANTS:
        key, usual, choices, class_of = VARIANTS[name]
        value = values.get(key, usual)
        if value is None:
            raw.problems.append(Problem(raw.located(f"{name}.{key}"), "nothing, and it has no default",
                                        ", ".join(choices), f"add {key} to the section {name}"))
            return None
        if not isinstance(value, str) or value not in choices:
            where = f"{name}.{key}"
            raw.problems.append(_choice_problem(raw.located(where), where, value, list(choices)))
            return None
        cls = class_of(value)
    try:
        return cls.model_validate({str(key): value for key, value in values.items()})
    except ValidationError as error:
        raw.problems.extend(_field_problem(raw, name, cls, detail) for detail in error.errors())
        return None


def _field_problem(raw: RawConfig, section: str, cls: type[BaseModel], detail: dict) -> Problem:
    """One of pydantic's errors in our words."""
    name = str(detail["loc"][0]) if detail["loc"] else section
    key = f"{section}.{name}"
    where = raw.located(key)
    if detail["type"] == "extra_forbidden":
        return _unknown_key(where, name, list(cls.model_fields), f"{section}.")
    field = cls.model_fields.get(name)
    meaning = field.description if field and field.description else name
    if detail["type"] == "missing":
        return Problem(where, "nothing, and it has no default", meaning, f"add {name} to the section {section}")
    if detail["type"] == "literal_error":
        choices = [str(choice) for choice in getattr(field.annotation, "__args__", ())]
        return _choice_problem(where, key, detail["input"], choices)
    wanted = detail["msg"].removeprefix("Input should be ").replace("a valid integer", "a whole number")
    wanted = wanted.replace("a valid boolean", "true or false").replace("a valid string", "a text in quotes")
    return Problem(where, f"{name}: {shown(detail['input'])}", f"{wanted} ({meaning})", f"give {key} {wanted}")


def _unknown_key(where: str, name: str, names: list[str], prefix: str) -> Problem:
    meant = nearest(name, names)
    change = f"did you mean {prefix}{meant}?" if meant else f"delete {prefix}{name}"
    return Problem(where, f"the unknown name {name}", ", ".join(names), change)


def _choice_problem(where: str, key: str, value: object, choices: list[str]) -> Problem:
    meant = nearest(str(value), choices)
    return Problem(where, shown(value), ", ".join(choices), f"set {key} to {meant or 'one of these'}")


def _problems_between(sections: dict[str, BaseModel], world_size: int | None) -> Iterator[Problem]:
    """Runs every check whose sections are there."""
    for needed, check in _CHECKS:
        if all(name in sections for name in needed):
            yield from (Problem(*found) for found in check(*(sections[name] for name in needed), world_size))


def _model_problems(model: FamilyConfig, world_size: int | None) -> Iterator[rules.Found]:
    return family_spec(model.family).problems(model)


def _layout_problems(parallel: ParallelConfig, precision: PrecisionConfig, model: FamilyConfig,
                     world_size: int | None) -> Iterator[rules.Found]:
    return rules.problems(parallel, precision, world_size, family_spec(model.family).facts(model))


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
