"""Reads the text of a config file and its overrides into plain values, with every mistake in them (no torch).

YAML is read by the rules of YAML 1.2's core schema, so that `3e-4` is a number and `no` a word. Aliases and tags that
build objects are refused: a config needs none, and aliases are how a small file grows without bound.
"""

import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from common.errors import Problem
from common.shipped_files import shipped_folder

MAX_BYTES = 1 << 20
MAX_DEPTH = 20
_VALUES = "a number, a word, a [list], true, false or null"
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_CORE_SCHEMA = (  # tag, pattern, first characters; the first that fits decides
    ("null", re.compile(r"~|null|Null|NULL|"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"true|True|TRUE|false|False|FALSE"), list("tTfF")),
    ("int", re.compile(r"[-+]?[0-9]+"), list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
)


class _Refused(yaml.YAMLError):
    """Valid YAML that a config has no use for."""

    def __init__(self, what: str, mark: yaml.Mark):
        self.problem, self.problem_mark = what, mark
        super().__init__(what)


class _Loader(yaml.SafeLoader):
    """A safe loader with the core schema, which notes where each key stands and which ones stand twice."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def __init__(self, text: str):
        super().__init__(text)
        self.depth = 0
        self.twice: list[tuple[str, int, int]] = []

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        mark = self.peek_event().start_mark
        if self.check_event(yaml.AliasEvent):
            raise _Refused("an alias (*name) is not supported; write the value out", mark)
        if self.depth >= MAX_DEPTH:
            raise _Refused(f"nested more than {MAX_DEPTH} deep", mark)
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _Refused("a key is a single word", key.start_mark)
            line = key.start_mark.line + 1
            if key.value in lines:
                self.twice.append((key.value, lines[key.value], line))
            lines.setdefault(key.value, line)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        return int(node.value)

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        text = node.value.lower()
        return float(text.replace(".inf", "inf").replace(".nan", "nan"))


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` and any other YAML reader read back as the same value."""


for _tag, _pattern, _first in _CORE_SCHEMA:
    _anchored = re.compile(rf"(?:{_pattern.pattern})\Z")
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _anchored, _first)
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _anchored, _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)


@dataclass
class RawConfig:
    """What was written: values by section and key, where each stands, and the mistakes found on the way."""

    source: str
    values: dict[str, object] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)  # dotted key: "line 12" or "command line"
    problems: list[Problem] = field(default_factory=list)

    def located(self, where: str) -> str:
        """`where` with its place, for a person who wants to go there."""
        place = self.places.get(where) or self.places.get(where.partition(".")[0])
        return f"{where} ({place})" if place else where


def read_config_file(path: Path) -> RawConfig:
    """Reads a config without judging its keys. Never raises for what a user wrote; see `RawConfig.problems`."""
    raw = RawConfig(str(path))
    text = _text(path, raw)
    if text is None:
        return raw
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        values = loader.construct_document(node) if node else None
    except yaml.YAMLError as error:
        raw.problems.append(_syntax_problem(raw.source, error))
        return raw
    except (ValueError, RecursionError) as error:
        raw.problems.append(Problem(raw.source, str(error), "plain YAML values", "write the value in a shorter form"))
        return raw
    finally:
        if loader:
            loader.dispose()
    for key, first, second in loader.twice:
        raw.problems.append(Problem(f"{raw.source}, line {second}", f"`{key}` again; it is already on line {first}",
                                    "every key once", "delete one of the two"))
    if not isinstance(values, dict):
        raw.problems.append(Problem(raw.source, f"{shown(values)} at the top of the file", "sections with fields",
                                    f"start from a recipe under {shipped_folder('configs')}"))
        return raw
    raw.values = values
    raw.places = _places(node) if isinstance(node, yaml.MappingNode) else {}
    return raw


def apply_overrides(raw: RawConfig, overrides: Sequence[str]) -> None:
    """Puts `section.key=value` texts over the values of the file; a later one wins over an earlier one.

    Whether the section and the key exist is judged with those of the file. Values are single YAML values or lists.
    """
    for override in overrides:
        value, problem = _override_value(override)
        if problem:
            raw.problems.append(problem)
            continue
        key = override.partition("=")[0]
        section, _, name = key.partition(".")
        values = raw.values.get(section)
        if values is None or isinstance(values, dict):
            raw.values[section] = {**(values or {}), name: value}
            raw.places[key] = "command line"
            raw.places.setdefault(section, "command line")


def dump(values: Mapping[str, Any]) -> str:
    """The values as YAML, in their order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _override_value(override: str) -> tuple[object, Problem | None]:
    """The value of one override, or what is wrong with it."""
    key, equals, text = override.partition("=")
    where = f"command line, {override}"
    if not equals or not re.fullmatch(r"\w+\.\w+", key):
        return None, Problem(where, "an override that is not section.key=value", "for example run.steps=100",
                             "name the section and the key, without spaces around =")
    if not text:
        return None, Problem(where, "no value", _VALUES, f"write a value after =, or {key}=null for none")
    loader = None
    try:
        loader = _Loader(text)
        value = loader.get_single_data()
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        return None, Problem(where, f"a value that is not YAML: {getattr(error, 'problem', None) or error}", _VALUES,
                             "quote the value, once for the shell and once for YAML")
    finally:
        if loader:
            loader.dispose()
    if isinstance(value, dict):
        return None, Problem(where, "several keys in one override", _VALUES, "give each key its own section.key=value")
    return value, None


def _text(path: Path, raw: RawConfig) -> str | None:
    problem = None
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            problem = Problem(raw.source, f"a file of more than {MAX_BYTES} bytes", "a config of a page or two",
                              "check that this is the config and not data")
        else:
            return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        problem = Problem(raw.source, f"byte {error.start} is not UTF-8", "a text file in UTF-8", "save it as UTF-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        problem = Problem(raw.source, f"a config file that cannot be read: {reason}", "a readable YAML file",
                          f"check the path; recipes lie under {shipped_folder('configs')}")
    raw.problems.append(problem)
    return None


def _syntax_problem(source: str, error: yaml.YAMLError) -> Problem:
    mark = getattr(error, "problem_mark", None)
    where = f"{source}, line {mark.line + 1}, column {mark.column + 1}" if mark else source
    what = " ".join(filter(None, (getattr(error, "context", None), getattr(error, "problem", None)))) or str(error)
    return Problem(where, what.replace("\n", " "), "plain YAML: sections, then indented `key: value` lines",
                   "mend this line; a text with : or # in it needs quotes")


def _places(node: yaml.MappingNode) -> dict[str, str]:
    places = {}
    for section, values in node.value:
        places[section.value] = f"line {section.start_mark.line + 1}"
        if isinstance(values, yaml.MappingNode):
            for key, _ in values.value:
                places[f"{section.value}.{key.value}"] = f"line {key.start_mark.line + 1}"
    return places


def shown(value: object, width: int = 60) -> str:
    """The value as a message quotes it."""
    text = repr(value)
    return text if len(text) <= width else text[: width - 3] + "..."
