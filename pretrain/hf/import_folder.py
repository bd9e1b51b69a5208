"""A checkpoint in our format from a transformers folder: weights only, one tensor in memory at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from common.files import flush
from parallel.tensor_slice import SliceRange
from pretrain.checkpoint.locate import CHECKPOINTS
from pretrain.checkpoint.manifest import FORMAT, file_entry, folder_name, package_versions, write_manifest
from pretrain.checkpoint.tensor_file import Planned, in_shards, write_tensors
from pretrain.config.run_config import RunConfig, config_from
from pretrain.hf.export_folder import written_aside
from pretrain.hf.read_folder import HFFolder
from pretrain.models import family_spec
from pretrain.models.hf_map import TOKEN_IDS

TOKENIZER_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tokenizer.json", "vocab.json",
                   "merges.txt", "vocab.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "preprocessor_config.json", "generation_config.json")


def starting_config(source: HFFolder, to: Path) -> RunConfig:
    """A run that starts from the weights imported to `to`; its data, batch and learning rate are placeholders."""
    values = {
        "run": {"dir": f"runs/from-{to.name}", "steps": 1000},
        "model": source.model.model_dump(),
        "objective": {"name": family_spec(source.family).objectives[0]},
        "data": {"train": "data/corpus/train"},
        "parallel": {"micro_batch": 1, "global_batch": 8},
        "optimizer": {"lr": 1e-4},
        "checkpoint": {"start_from": str(to)},
    }
    return config_from(values, str(source.folder))


def write_run(source: HFFolder, config: RunConfig, to: Path, file_bytes: int) -> Path:
    """Write a run folder `to` with one checkpoint, of step 0 and without moments; `source` is bound to our names.

    Args:
        config: a whole run with the model of `source`, written beside the checkpoint.
        file_bytes: the most bytes of a file that holds more than one tensor.

    Returns: the checkpoint's folder.
    Raises:
        UserError: `to` exists, or a file of `source` could not be read.
        StorageError: the disk refused.
    """
    inside = Path(CHECKPOINTS) / folder_name(0)
    with written_aside(to) as aside:
        folder = aside / inside
        folder.mkdir(parents=True)
        files = list(_write_weights(source, folder, file_bytes))
        for name in TOKENIZER_FILES:
            if (source.folder / name).is_file():
                copy = Path(shutil.copyfile(source.folder / name, folder / name))
                flush(copy)
                files.append(file_entry(copy))
        write_manifest(folder, {"format": FORMAT, "files": files, "versions": package_versions(),
                                **_manifest_fields(source, config)})
        config.save(aside / "config.yaml")
        flush(folder)
    return to / inside


def _manifest_fields(source: HFFolder, config: RunConfig) -> dict[str, Any]:
    """As `pretrain.training.resume.manifest_fields`, for a run that has not taken a step."""
    return {
        "config": json.loads(config.model_dump_json()), "dataset": None, "world_size": 1, "step": 0, "adam_step": 0,
        "position_samples": 0, "parameters": config.spec.built_parameter_count(config.model), "weights_only": True,
        "imported": {"architecture": source.architecture.model_type,
                     "token_ids": {key: source.imported.token_ids[key] for key in TOKEN_IDS
                                   if key in source.imported.token_ids}},
    }


def _write_weights(source: HFFolder, folder: Path, file_bytes: int) -> Iterator[dict[str, Any]]:
    """Write the safetensors files; gives the manifest's entry of each."""
    ranges = [SliceRange.whole(name, shape) for name, shape in source.shapes.items()]
    planned = [Planned(f"{number:06d}", (part.count,), torch.float32) for number, part in enumerate(ranges)]
    for number, shard in enumerate(in_shards([plan.num_bytes for plan in planned], file_bytes)):
        index = {planned[i].name: asdict(ranges[i]) for i in shard}
        path = folder / f"weights-{number:05d}.safetensors"
        digest = write_tensors(path, [planned[i] for i in shard], (source.read_range(ranges[i]) for i in shard),
                               {"fragments": json.dumps(index)})
        yield file_entry(path, digest)
