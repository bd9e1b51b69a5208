"""Starting a run with the weights of another checkpoint: whether its model is that of the run (no torch)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.errors import CheckpointError, Damage, Problem
from pretrain.checkpoint.locate import checkpoints_at
from pretrain.checkpoint.manifest import read_manifest
from pretrain.models.family import FamilyConfig

KEY = "checkpoint.start_from"
# Fields that change neither what the tensors mean nor, but for their padding or length, what shape they have.
MAY_DIFFER = ("pad_vocab_to", "dropout", "attention_dropout", "init_std", "sequence_length", "target_length",
              "max_positions", "freeze", "init_temperature", "capacity_factor", "balance_loss", "z_loss")


def start_folder(start_from: str | Path) -> Path | None:
    """The newest checkpoint at a path; None where there is none."""
    return next(iter(checkpoints_at(Path(start_from))), None)


def start_problems(start_from: str, model: FamilyConfig) -> Iterator[Problem]:
    """What keeps a run of `model` from starting with those weights."""
    folder = start_folder(start_from)
    if folder is None:
        yield Problem(KEY, f"{start_from}, where no checkpoint is", "a run folder, or one of its checkpoints",
                      f"check the path, or leave {KEY} out to start with drawn weights")
        return
    try:
        written = read_manifest(folder)["config"]["model"]
    except CheckpointError as error:
        yield Damage(KEY, str(error), "a whole checkpoint", "choose another one")
        return
    asked = json.loads(model.model_dump_json())
    for name in sorted({*written, *asked} - set(MAY_DIFFER)):
        if not _same(name, written.get(name), asked.get(name), model):
            yield Problem(f"model.{name}", f"{asked.get(name)}, while {folder} holds a model with {written.get(name)}",
                          f"{written.get(name)} to start with its weights",
                          f"set model.{name}={json.dumps(written.get(name))}, or leave {KEY} out")


def _same(name: str, written: Any, asked: Any, model: FamilyConfig) -> bool:
    """Equal, or a field that was left out where the other config says its value."""
    return written == asked or (None in (written, asked) and name in type(model).model_fields
                                and type(model).model_fields[name].default is None)
