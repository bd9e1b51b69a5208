"""One run, as its YAML file describes it: the sections, and everything that is wrong with them at once (no torch)."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, SerializeAsAny, ValidationError, ValidationInfo, field_validator
from pydantic_core import ErrorDetails

from common.errors import ConfigError, Problem
from common.files import write_file
from common.wording import nearest
from data_pipeline.config import DataConfig
from parallel.config import ParallelConfig, PrecisionConfig
from pretrain.config.checks import machine_problems, problems_between
from pretrain.config.config_file import RawConfig, apply_overrides, dump, read_config_file, shown
from pretrain.config.sections import (
    CheckpointSection,
    LogSection,
    OptimizerSection,
    RunSection,
    ScheduleSection,
    Section,
)
from pretrain.models import FAMILIES, family_spec
from pretrain.models.family import FamilyConfig, FamilySpec
from pretrain.objectives import OBJECTIVES
from pretrain.objectives.objective import ObjectiveConfig, ObjectiveSpec

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
        key, _, choices, class_of = VARIANTS[str(info.field_name)]
        if isinstance(values, dict) and values.get(key) in choices:
            return class_of(values[key]).model_validate(values)
        return values

    @property
    def spec(self) -> FamilySpec[Any]:
        """What is known of the model's family without torch."""
        return family_spec(self.model.family)

    @property
    def objective_spec(self) -> ObjectiveSpec[Any, Any]:
        """What is known of the objective without torch."""
        return OBJECTIVES[self.objective.name]

    @property
    def window_tokens(self) -> int:
        """Tokens of text in one sample, before the objective does anything to it."""
        return self.objective_spec.window_tokens(self.objective, self.model)

    @property
    def num_predictions(self) -> int | None:
        """Tokens of a sample for which the model's head makes logits; None: all."""
        return self.objective_spec.num_predictions(self.objective, self.model)

    def problems(self, world_size: int | None) -> list[Problem]:
        """What keeps this config from running on `world_size` ranks anywhere; looks at no file.

        None leaves out the rules that depend on the number of ranks.
        """
        return list(problems_between(dict(self), world_size))

    def machine_problems(self) -> list[Problem]:
        """What keeps it from running here: the run folder, the datasets, the weights to start from."""
        return list(machine_problems(dict(self)))

    def text(self) -> str:
        """The resolved config as YAML; reading it gives an equal config."""
        return dump(self.model_dump())

    def save(self, path: Path) -> None:
        """Writes the resolved config in one piece: a reader never sees half of it. Raises OSError."""
        write_file(path, self.text())


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a config with `section.key=value` overrides, each section checked for itself.

    Raises ConfigError with all problems. Whether the run can start is another question: `load_run`.
    """
    raw, sections = _read(Path(path), overrides)
    return _config_or_error(raw, sections)


def load_run(path: str | Path, overrides: Sequence[str] = (), world_size: int | None = None) -> RunConfig:
    """Like `load_config`, and checks that the run can start here on `world_size` ranks, all in one go.

    Args:
        world_size: None stands for the ranks of one model, tensor x context x pipeline.

    Raises:
        ConfigError: with the problems of single fields and those between the sections that could be read.
    """
    raw, sections = _read(Path(path), overrides)
    parallel = sections.get("parallel")
    if world_size is None and isinstance(parallel, ParallelConfig):
        world_size = parallel.model_ranks
    found = [*problems_between(sections, world_size), *machine_problems(sections)]
    raw.problems.extend(problem._replace(where=raw.located(problem.where)) for problem in found)
    return _config_or_error(raw, sections)


def config_from(values: dict[str, Any], source: str) -> RunConfig:
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


def _field_problem(raw: RawConfig, section: str, cls: type[BaseModel], detail: ErrorDetails) -> Problem:
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
        choices = [str(choice) for choice in getattr(field and field.annotation, "__args__", ())]
        return _choice_problem(where, key, detail["input"], choices)
    wanted = detail["msg"].removeprefix("Input should be ").replace("a valid integer", "a whole number")
    wanted = wanted.replace("a valid boolean", "true or false").replace("a valid string", "a text in quotes")
    wanted = wanted.replace("a valid list", "a list in brackets")
    return Problem(where, f"{name}: {shown(detail['input'])}", f"{wanted} ({meaning})", f"give {key} {wanted}")


def _unknown_key(where: str, name: str, names: list[str], prefix: str) -> Problem:
    meant = nearest(name, names)
    change = f"did you mean {prefix}{meant}?" if meant else f"delete {prefix}{name}"
    return Problem(where, f"the unknown name {name}", ", ".join(names), change)


def _choice_problem(where: str, key: str, value: object, choices: list[str]) -> Problem:
    meant = nearest(str(value), choices)
    return Problem(where, shown(value), ", ".join(choices), f"set {key} to {meant or 'one of these'}")
