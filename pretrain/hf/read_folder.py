"""A transformers folder opened for reading: its config in our terms, its tensors under our names, one at a time."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.errors import ExitCode, Problem, TrainyardError, render
from parallel.tensor_slice import SliceRange, cut_from
from pretrain.hf.config_json import by_model_type, read_config
from pretrain.hf.tensor_steps import to_ours, to_theirs
from pretrain.models import family_spec
from pretrain.models.hf_map import Architecture, Converted, converted, pattern

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
MAX_JSON_BYTES = 1 << 28
REAL = ("F64", "F32", "F16", "BF16")
MAX_PROBLEMS_SHOWN = 12


class HFError(TrainyardError):
    """A transformers folder that cannot be read, with every problem found."""

    def __init__(self, source: Path, problems: Iterable[Problem], exit_code: int = ExitCode.USER):
        problems = list(problems)
        text = render(problems[:MAX_PROBLEMS_SHOWN], str(source))
        if len(problems) > MAX_PROBLEMS_SHOWN:
            text += f"\n     and {len(problems) - MAX_PROBLEMS_SHOWN} more"
        super().__init__(text, exit_code)


@dataclass(frozen=True)
class TensorLocation:
    """The file of a tensor, its name there, and its shape and number type as the file's header has them."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


def is_hf_folder(path: Path) -> bool:
    """Whether a path is a transformers folder: a folder with config.json."""
    return (path / CONFIG).is_file()


class HFFolder:
    """A model of transformers on disk.

    Attributes:
        family, model: our family and config for it.
        architecture: its name map.
        imported: all of config.json in our terms.
        shapes: of our tensors, by global name; empty before `bind`.
    """

    def __init__(self, folder: Path):
        """Reads config.json and the header of every safetensors file.

        Raises:
            HFError: no name map has its architecture, or a file of it is missing or damaged.
        """
        self.folder = folder
        if not folder.is_dir():
            raise HFError(folder, [Problem(str(folder), "a folder that is not there", "a folder with config.json and "
                                           "safetensors files", "check the path")])
        values = _json(folder / CONFIG)
        self.family, self.architecture = self._architecture(values)
        self._stand_ins = self.architecture.stand_ins(values)
        found = _locations(folder)
        self._stored = {_modern(name, self.architecture.renamed): location for name, location in found.items()}
        self.imported = read_config(self.family, self.architecture, values, self._stored.keys())
        if self.imported.model is None:
            raise HFError(folder / CONFIG, self.imported.problems)
        self.model = self.imported.model
        self._check_size()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._converted: dict[str, Converted] = {}
        self._locations: dict[str, TensorLocation] = {}

    def _architecture(self, values: Mapping[str, Any]) -> tuple[str, Architecture]:
        known, asked = by_model_type(), values.get("model_type")
        if not isinstance(asked, str) or asked not in known:
            named = f"model_type {asked!r}" if asked is not None else "no model_type"
            raise HFError(self.folder / CONFIG, [Problem("model_type", named, ", ".join(known),
                                                         "take a model of one of these architectures")])
        return known[asked]

    def _check_size(self) -> None:
        """Compare the sizes in config.json with the tensors: a wrong one could build a model of any size.

        Raises:
            HFError: a size is larger than the tensors allow.
        """
        traits = family_spec(self.family).traits(self.model)
        longest = max((size for location in self._stored.values() for size in location.shape), default=0)
        limits = {"layers": len(self._stored), "hidden": longest, "ffn": longest, "vocab_size": longest,
                  "heads": longest, "experts": len(self._stored)}
        problems = [Problem(f"{name} in {CONFIG}", f"{getattr(traits, name):,}", f"at most {limit:,}, going by the "
                            "tensors in the folder", "put back the config.json or the tensors that belong together")
                    for name, limit in limits.items() if getattr(traits, name) > limit]
        if problems:
            raise HFError(self.folder, problems, ExitCode.DATA)

    def bind(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Find the location of every tensor of our model, given its global names and shapes.

        Raises:
            HFError: a tensor is missing, left over, of another shape than config.json says, or not of real numbers.
        """
        self.shapes = dict(shapes)
        self._converted = converted(self.architecture.names(self.model), shapes)
        wanted = _wanted(self._converted, shapes)
        copies = self.architecture.copies(self.model)
        self._locations, left_over = self._named({*wanted, *copies, *self.architecture.zeros})
        for copy, original in copies.items():  # some folders keep only the copy
            if copy in self._locations:
                self._locations.setdefault(original, self._locations[copy])
        for absent, source in self._stand_ins.items():
            if absent in wanted and source in self._locations:
                self._locations.setdefault(absent, self._locations[source])
        problems = [*_missing(wanted, self._locations), *_left_over(left_over), *_misshapen(wanted, self._locations)]
        if problems:
            raise HFError(self.folder, problems, ExitCode.DATA)

    def _named(self, known: Collection[str]) -> tuple[dict[str, TensorLocation], list[str]]:
        """Locations by the names of today, and stored names that are neither `known` nor ignored."""
        ignored = [pattern(name) for name in self.architecture.ignored]
        locations, left_over = {}, []
        for name, location in self._stored.items():
            full = next((text for text in (name, self.architecture.prefix + name)
                         if text in known or any(regex.fullmatch(text) for regex in ignored)), None)
            if full is None:
                left_over.append(location.name)
            elif full in known:
                locations[full] = location
        return locations, left_over

    def check_repeated(self) -> None:
        """Read the tensors that must equal another, or be zero, because our model has one or none in their place.

        Raises:
            HFError: one of them has other numbers.
        """
        problems = []
        for copy, original in self.architecture.copies(self.model).items():
            location, source = self._locations.get(copy), self._locations[original]
            if location and location is not source and not torch.equal(_read(location), _read(source)):
                problems.append(Problem(f"tensor {copy}", f"other numbers than {original}",
                                        f"the same: going by {CONFIG} they are tied, and one tensor here",
                                        f"take a model where they are, or correct {CONFIG}"))
        for name in self.architecture.zeros:
            if name in self._locations and _read(self._locations[name]).any():
                problems.append(Problem(f"tensor {name}", "numbers other than 0", "0: there is no such part here",
                                        "take a model without it"))
        if problems:
            raise HFError(self.folder, problems, ExitCode.DATA)

    def notes(self) -> list[str]:
        """Settings of the folder that an import drops: those of training, and of the preparation of inputs."""
        found = list(self.imported.notes)
        for name, ours in self.architecture.files(self.model).items():
            theirs = _json(self.folder / name) if (self.folder / name).is_file() else {}
            found += [f"{name} has {key}={theirs[key]!r}, and here it is {value!r}" for key, value in ours.items()
                      if not isinstance(value, dict | str) and key in theirs and theirs[key] != value]
        return found

    def tensor(self, name: str, kind: str = "weight") -> Tensor:
        """The whole tensor of our global name, fp32 on the CPU; a folder of transformers holds weights only.

        Raises:
            HFError: the file could not be read.
        """
        way = self._converted[name]
        return to_ours([_read(self._locations[theirs]).float() for theirs in way.theirs], way.steps).contiguous()

    def read_range(self, wanted: SliceRange) -> Tensor:
        """The elements of a range, flat; the whole tensor is read, since a conversion may take any of it to any place.

        Raises:
            HFError: the file could not be read.
        """
        return cut_from(self.tensor(wanted.name), wanted)


# -- tensors that a model needs ----------------------------------------------------------------------------------------


def _wanted(ways: Mapping[str, Converted], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Name and shape in transformers of every tensor that ours are made from."""
    wanted: dict[str, tuple[int, ...]] = {}
    for name, way in ways.items():
        parts = to_theirs(torch.empty(shapes[name], device="meta"), way.steps)
        wanted |= {theirs: tuple(part.shape) for theirs, part in zip(way.theirs, parts, strict=True)}
    return wanted


def _missing(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[Problem]:
    for name in wanted:
        if name not in found:
            yield Problem(f"tensor {name}", "nothing by that name", "a tensor for every part that config.json names",
                          "take a folder that holds the whole model, with its head")


def _left_over(names: Iterable[str]) -> Iterator[Problem]:
    for name in sorted(names):
        yield Problem(f"tensor {name}", "a tensor that this model has no place for", "only tensors of the model",
                      "take another folder: config.json does not describe this one")


def _misshapen(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, TensorLocation]) -> Iterator[Problem]:
    """Tensors of another shape than wanted, or of a number type that is not read."""
    for name, shape in wanted.items():
        location = found.get(name)
        if location and location.shape != shape:
            yield Problem(f"tensor {name}", f"shape {list(location.shape)} in {location.file.name}",
                          f"{list(shape)}, which follows from {CONFIG}",
                          "put back the config.json or the tensors that belong together")
        elif location and location.dtype not in REAL:
            yield Problem(f"tensor {name}", f"numbers of type {location.dtype}", ", ".join(REAL),
                          "take a model that is not quantized")


# -- files -------------------------------------------------------------------------------------------------------------


def _modern(name: str, renamed: Iterable[tuple[str, str]]) -> str:
    for old, new in renamed:
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def _read(location: TensorLocation) -> Tensor:
    try:
        with safe_open(location.file, framework="pt") as file:
            return file.get_tensor(location.name)
    except (OSError, SafetensorError) as error:
        raise HFError(location.file.parent, [_damaged(location.file, error)], ExitCode.DATA) from None


def _locations(folder: Path) -> dict[str, TensorLocation]:
    """Every tensor of the folder's safetensors files, by its name there."""
    found: dict[str, TensorLocation] = {}
    problems = []
    for file, listed in _files(folder).items():
        try:
            with safe_open(file, framework="pt") as opened:
                slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
                here = {name: TensorLocation(file, name, tuple(part.get_shape()), part.get_dtype())
                        for name, part in slices.items()}
        except (OSError, SafetensorError) as error:
            problems.append(_damaged(file, error))
            continue
        problems += [Problem(f"tensor {name}", f"nothing in {file.name}, where {INDEX} says it is", "the tensor",
                             "fetch the folder again") for name in sorted(set(listed) - set(here))]
        twice = here.keys() & found.keys()
        problems += [Problem(f"tensor {name}", f"in {file.name} and in {found[name].file.name}", "one of them",
                             "remove the file that does not belong to the model") for name in sorted(twice)]
        found |= here
    if problems:
        raise HFError(folder, problems, ExitCode.DATA)
    return found


def _damaged(file: Path, error: Exception) -> Problem:
    if isinstance(error, FileNotFoundError) or not file.exists():
        return Problem(file.name, f"a file that {INDEX} names and that is not there", "every shard of the model",
                       "fetch the missing file")
    return Problem(file.name, f"a file that cannot be read ({error}), {file.stat().st_size:,} bytes",
                   "a whole safetensors file", "fetch it again: it may have been cut short")


def _files(folder: Path) -> dict[Path, list[str]]:
    """The safetensors files of the model, and the names that the index lists for each."""
    if (folder / INDEX).exists():
        weight_map = _json(folder / INDEX).get("weight_map")
        entries = weight_map.items() if isinstance(weight_map, dict) else ()
        files: dict[Path, list[str]] = {}
        for name, file in entries:
            if not isinstance(file, str) or Path(file).name != file or file.startswith("."):
                raise HFError(folder / INDEX, [Problem(name, f"the file {file!r}", "a file of the same folder",
                                                       "do not use this folder: its index points elsewhere")])
            files.setdefault(folder / file, []).append(name)
        if files:
            return files
        raise HFError(folder / INDEX, [Problem("weight_map", "nothing", "the file of every tensor",
                                               "fetch the index again")], ExitCode.DATA)
    if (folder / SINGLE).exists():
        return {folder / SINGLE: []}
    raise HFError(folder, [_no_tensors(folder)])


def _no_tensors(folder: Path) -> Problem:
    pickled = next((path.name for path in sorted(folder.glob("*.bin*"))), None)
    if pickled:
        return Problem(pickled, "tensors in pickled files only", f"{SINGLE}, or several files with {INDEX}: reading a "
                       "pickle runs whatever code is in it",
                       "where you trust the folder: load it with transformers and save_pretrained() it, then import "
                       "that")
    return Problem(str(folder), "a folder without tensors", f"{SINGLE}, or several files with {INDEX}",
                   "fetch the model's files into it")


def _json(path: Path) -> dict[str, Any]:
    """An object of a JSON file. Raises HFError when it is not there, too large, or something else."""
    reason = ""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            reason = f"more than {MAX_JSON_BYTES:,} bytes"
        else:
            values = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(values, dict):
                return values
            reason = "not a JSON object"
    except OSError as error:
        reason = error.strerror or str(error)
    except (ValueError, RecursionError) as error:
        reason = f"not JSON ({error})"
    raise HFError(path.parent, [Problem(path.name, f"a file that cannot be used: {reason}", "a JSON object",
                                        "fetch the folder again, and check the path")],
                  ExitCode.DATA if path.exists() else ExitCode.USER)
