"""Writing a transformers folder from a checkpoint of any layout, one tensor in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
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
    """A model, its tensors, and how they are written.

    Args:
        shapes: of the tensors by global name, in the order of the layers.
        tensor: whole tensors by global name.
        architecture: the name map.
        token_ids: ids of special tokens for config.json.
        dtype: number format of the weights, a key of NUMBER_FORMATS.
        file_bytes: the most bytes of a file that holds more than one tensor.
        write_tokenizer: writes the tokenizer's files into a folder; None: there are none.
    """

    model: FamilyConfig
    shapes: dict[str, tuple[int, ...]]
    tensor: Callable[[str], Tensor]
    architecture: Architecture
    _: KW_ONLY
    token_ids: dict[str, Any]
    dtype: str
    file_bytes: int
    write_tokenizer: Callable[[Path], None] | None = None


def write_export(what: Export, to: Path, certify: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Write the folder `to` under a temporary name, check it and rename it. Returns the certificate.

    Args:
        certify: from the folder under its temporary name, the content of certificate.json.

    Raises:
        UserError: `to` exists.
        ConversionError: the two sides differ; nothing is left behind.
        StorageError: the disk refused.
        LookupError: the name map does not fit the model.
    """
    with written_aside(to) as aside:
        write_folder(what, aside)
        found = certify(aside)
        if not found["within"]:
            differences = ", ".join(f"{name} by {size:.3g}" for name, size in found["largest_differences"].items())
            raise ConversionError(f"{to}: not written. What transformers computes from it is off ({differences}; at "
                                  f"most {found['bound']:.3g}). This is a defect in the name map of "
                                  f"{what.architecture.model_type}, or a change in transformers "
                                  f"{found['versions']['transformers']}.")
        _write_json(aside / CERTIFICATE, found)
    return found


def check_new(to: Path) -> None:
    """Raises UserError when a path exists, before anything is read or built for it."""
    if to.exists():
        raise UserError(f"{to} exists already: choose another --to, or move it away")


@contextmanager
def written_aside(to: Path) -> Iterator[Path]:
    """A temporary folder beside `to` that becomes `to` when the block ends well, and is removed when it does not.

    Raises:
        UserError: `to` exists, or no folder can be made there.
        StorageError: the disk refused, now or in the block.
    """
    check_new(to)
    with writing(to), write_folder_aside(to) as aside:
        yield aside


def write_folder(what: Export, folder: Path) -> None:
    """Write config.json, the safetensors files with their index, other files of the architecture, and the tokenizer."""
    ways = converted(what.architecture.names(what.model), what.shapes)
    planned = {name: _planned(what, name, way) for name, way in ways.items()}
    names = list(planned)
    shards = in_shards([sum(plan.num_bytes for plan in planned[name]) for name in names], what.file_bytes)
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
    if what.write_tokenizer:
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
