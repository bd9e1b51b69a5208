"""Writing a transformers folder from a checkpoint of any layout: one tensor in memory at a time, proved, then named."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import ConversionError, UserError
from common.files import flush, write_folder_aside, writing
from common.number_formats import NUMBER_FORMATS
from parallel.precision import DTYPES
from pretrain.checkpoint.tensor_file import Planned, in_shards, write_tensors
from pretrain.hf.config_json import write_config
from pretrain.hf.read_folder import CONFIG, INDEX, SINGLE
from pretrain.hf.tensor_steps import to_theirs
from pretrain.models.family import FamilyConfig
from pretrain.models.hf_map import Architecture, Converted, converted

CERTIFICATE = "certificate.json"


@dataclass(frozen=True)
class Export:
    """What is to be written: a model, its global tensors, and in which words."""

    model: FamilyConfig
    shapes: dict[str, tuple[int, ...]]  # by global name, in the order of the layers
    tensor: Callable[[str], Tensor]  # whole tensors by global name
    architecture: Architecture
    token_ids: dict[str, Any]
    dtype: str  # a key of NUMBER_FORMATS
    shard_bytes: int
    write_tokenizer: Callable[[Path], None] = lambda folder: None  # its files, into a folder


def export(what: Export, to: Path, certify: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Write the folder `to`, which gets its name only once `certify` has found it right; returns the certificate.

    Args:
        certify: given the folder under a temporary name, what certificate.json shall hold.

    Raises:
        UserError: `to` is there already.
        ConversionError: the folder is off; nothing is left behind.
        StorageError: the disk refused.
        LookupError: the name map does not fit the model.
    """
    with written_aside(to) as aside:
        write_folder(what, aside)
        told = certify(aside)
        if not told["within"]:
            found = ", ".join(f"{name} by {size:.3g}" for name, size in told["largest_differences"].items())
            raise ConversionError(f"{to}: not written. What transformers computes from it is off ({found}; at most "
                                  f"{told['bound']:.3g}). This is a defect in the name map of "
                                  f"{what.architecture.model_type}, or a change in transformers "
                                  f"{told['versions']['transformers']}.")
        _write_json(aside / CERTIFICATE, told)
    return told


@contextmanager
def written_aside(to: Path) -> Iterator[Path]:
    """A temporary folder beside `to` that becomes `to` when the block ends well, and is gone when it does not.

    Raises:
        UserError: `to` exists, or no folder can be made there.
        StorageError: the disk refused, now or in the block.
    """
    if to.exists():
        raise UserError(f"{to} exists already: choose another --to, or move it away")
    with writing(to), write_folder_aside(to) as aside:
        yield aside


def write_folder(what: Export, folder: Path) -> None:
    """config.json, the safetensors files with their index, what else the architecture has, and the tokenizer."""
    ways = converted(what.architecture.names(what.model), what.shapes)
    planned = {name: _planned(what, name, way) for name, way in ways.items()}
    names = list(planned)
    shards = in_shards([sum(plan.num_bytes for plan in planned[name]) for name in names], what.shard_bytes)
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        here = [names[index] for index in shard]
        plans = [plan for name in here for plan in planned[name]]
        write_tensors(folder / file, plans, _parts(what, here, ways), {"format": "pt"})
        places |= {plan.name: file for plan in plans}
    if len(shards) > 1:
        total = sum(plan.num_bytes for plans in planned.values() for plan in plans)
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
    dtype = NUMBER_FORMATS[what.dtype].torch
    _write_json(folder / CONFIG, write_config(what.architecture, what.model, what.token_ids, dtype))
    for name, content in what.architecture.files(what.model).items():
        _write_json(folder / name, content)
    what.write_tokenizer(folder)


def _planned(what: Export, name: str, way: Converted) -> list[Planned]:
    parts = to_theirs(torch.empty(what.shapes[name], device="meta"), way.steps)
    return [Planned(theirs, tuple(part.shape), DTYPES[what.dtype])
            for theirs, part in zip(way.theirs, parts, strict=True)]


def _parts(what: Export, names: Iterable[str], ways: dict[str, Converted]) -> Iterator[Tensor]:
    for name in names:
        yield from to_theirs(what.tensor(name), ways[name].steps)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    flush(path)
