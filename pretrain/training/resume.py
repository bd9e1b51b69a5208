"""Whether a run folder may be continued with a config, and what a checkpoint has to say for that."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from common.errors import ConfigError, Problem
from pretrain.config.run_config import RunConfig, config_from

# What decides which weights are learnt, beside the content of the data. A layout, a schedule's length or a logging
# interval may change in mid-run, and the dataset may move.
LEARNT = ("run.seed", "model", "objective", "parallel.global_batch", "optimizer")


def dataset_fingerprint(folder: str | Path) -> str:
    """SHA-256 of a dataset's manifest, which itself holds the hash of every shard."""
    return hashlib.sha256((Path(folder) / "dataset.json").read_bytes()).hexdigest()


def manifest_fields(config: RunConfig, world_size: int, adam_step: int) -> dict[str, Any]:
    """What the manifest holds besides files and the task's state: enough to continue, to refuse, to say who wrote it.
    """
    return {
        "config": json.loads(config.model_dump_json()),
        "dataset": dataset_fingerprint(config.data.train),
        "world_size": world_size,
        "adam_step": adam_step,
        "parameters": config.spec.built_parameter_count(config.model),
    }


def check_same_run(config: RunConfig, manifest: dict[str, Any], folder: Path) -> None:
    """Refuse to continue a checkpoint under a config that would learn something else.

    Raises:
        ConfigError: with every difference in what is learnt.
    """
    # A key that is newer than the checkpoint had its default then.
    written = json.loads(config_from(manifest["config"], str(folder)).model_dump_json())
    asked = json.loads(config.model_dump_json())
    problems = []
    for key in LEARNT:
        old, new = _at(written, key), _at(asked, key)
        for where, before, after in _differences(key, old, new):
            problems.append(Problem(where, f"{after}, while the checkpoint {folder.name} was trained with {before}",
                                    f"{before} to continue it", f"set {where} back, or choose a new run.dir"))
    if not problems and manifest["dataset"] != dataset_fingerprint(config.data.train):
        changed = f"{config.data.train}, whose content changed since {folder.name} was written"
        problems.append(Problem("data.train", changed,
                                "the same shards, since positions in them are being continued",
                                "put the dataset back, or choose a new run.dir"))
    if problems:
        raise ConfigError(problems, f"the run folder {config.run.dir} holds another run")


def _at(tree: dict[str, Any], key: str) -> Any:
    found: Any = tree
    for part in key.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found


def _differences(where: str, old: Any, new: Any):
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted({*old, *new}):
            yield from _differences(f"{where}.{name}", old.get(name), new.get(name))
    elif old != new:
        yield where, old, new
