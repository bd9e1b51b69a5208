"""Saving a checkpoint, and finding the newest one that is whole; the ranks do both together.

Each rank writes the ranges that it owns into a temporary folder, and rank 0 publishes the folder with one rename.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from common.errors import CheckpointError, OtherFormatError, StorageError
from common.files import flush
from parallel.tensor_slice import OwnedFragment
from pretrain.checkpoint.locate import checkpoints_at
from pretrain.checkpoint.manifest import (
    FORMAT,
    damaged_files,
    file_entry,
    folder_name,
    package_versions,
    read_manifest,
    write_manifest,
)
from pretrain.checkpoint.reader import Checkpoint
from pretrain.checkpoint.tensor_file import Planned, write_tensors


def save(checkpoints: Path, step: int, fragments: Iterable[OwnedFragment], fields: dict[str, Any], *,
         keep: int, companions: Iterable[Path] = ()) -> Path:
    """Write the checkpoint of one step; called by every rank together.

    Args:
        checkpoints: the run's checkpoint folder, shared by all ranks.
        fragments: what this rank owns.
        fields: the rest of the manifest (config, position, step of Adam ..); equal on all ranks.
        keep: how many of the newest checkpoints stay.
        companions: further files that travel with it (the tokenizer).

    Returns: the published folder.
    Raises:
        StorageError: on every rank, when any rank could not write; nothing is published then.
    """
    final = checkpoints / folder_name(step)
    aside = checkpoints / f"{final.name}.part"
    rank = dist.get_rank()
    _together(lambda: _clear(aside) if rank == 0 else None, f"cannot make {aside}")
    entries = _together(lambda: _write_own(aside, rank, fragments), f"cannot write to {aside}")

    def publish() -> None:
        content = {"format": FORMAT, "step": step, "files": [entry for entry in entries if entry],
                   "versions": package_versions(), **fields}
        _publish(aside, final, content, keep=keep, companions=companions)

    _together(lambda: publish() if rank == 0 else None, f"cannot publish {final}")
    return final


def _together(work, what: str) -> list[Any]:
    """Run `work` on every rank and gather the results; a failure on one is raised on all, so that none waits."""
    outcome: tuple[Any, str | None]
    try:
        outcome = (work(), None)
    except OSError as error:
        outcome = (None, f"rank {dist.get_rank()}: {error}")
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, outcome)  # whole world: every rank must know of every failure
    failures = [failure for _, failure in outcomes if failure]
    if failures:
        raise StorageError(f"{what}: {'; '.join(failures[:3])}. Earlier checkpoints are untouched.")
    return [result for result, _ in outcomes]


def _clear(aside: Path) -> None:
    if aside.exists():
        shutil.rmtree(aside)
    aside.mkdir(parents=True)


def _write_own(aside: Path, rank: int, fragments: Iterable[OwnedFragment]) -> dict[str, Any] | None:
    owned = list(fragments)
    if not owned:
        return None
    path = aside / f"rank-{rank:05d}.safetensors"
    planned = [Planned(f"{number:06d}", (fragment.range.count,), torch.float32)
               for number, fragment in enumerate(owned)]
    index = {plan.name: asdict(fragment.range) for plan, fragment in zip(planned, owned, strict=True)}
    digest = write_tensors(path, planned, (fragment.tensor for fragment in owned), {"fragments": json.dumps(index)})
    return file_entry(path, digest)


def _publish(aside: Path, final: Path, content: dict[str, Any], *, keep: int, companions: Iterable[Path]) -> None:
    for source in companions:
        copy = Path(shutil.copyfile(source, aside / source.name))
        flush(copy)
        content["files"].append(file_entry(copy))
    write_manifest(aside, content)
    flush(aside)
    replaced = final.with_name(f"{final.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():  # one of the same step that did not verify; it goes only once the new one has its name
        final.rename(replaced)
    aside.rename(final)
    flush(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    for old in checkpoints_at(final.parent)[keep:]:
        shutil.rmtree(old, ignore_errors=True)


def newest_whole(path: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies and why newer ones were passed over; called by every rank together.

    Args:
        path: as `checkpoints_at` takes it.

    Raises:
        CheckpointError: checkpoints exist and none verifies; a run never starts from zero over them.
        OtherFormatError: the newest whole one is in a format of another version.
    """
    rejected: list[str] = []
    candidates = checkpoints_at(path) if dist.get_rank() == 0 else []
    shared: list[Any] = [candidates]
    dist.broadcast_object_list(shared, src=0)  # whole world: all must look at the same list
    for folder in shared[0]:
        problems = _verify_together(folder)
        if not problems:
            return Checkpoint(folder), rejected
        rejected += problems
    if rejected:
        listed = "\n  ".join(rejected[:10])
        raise CheckpointError(f"no checkpoint in {path} can be used:\n  {listed}\nRepair or move them away, or "
                              "choose another run.dir to start anew.")
    return None, rejected


def open_whole(folder: Path) -> Checkpoint:
    """A checkpoint that verifies; called by every rank together.

    Raises:
        CheckpointError: it does not.
    """
    problems = _verify_together(folder)
    if problems:
        listed = "\n  ".join(problems[:10])
        raise CheckpointError(f"{folder} cannot be used:\n  {listed}")
    return Checkpoint(folder)


def _verify_together(folder: Path) -> list[str]:
    """Each rank hashes its share of the files; the problems of all, on all.

    Raises:
        OtherFormatError: on every rank, when one sees a format of another version.
    """
    own, foreign = [], None
    try:
        files = read_manifest(folder)["files"]
        own = damaged_files(folder, files[dist.get_rank() :: dist.get_world_size()])
    except OtherFormatError as error:
        foreign = str(error)
    except CheckpointError as error:
        own = [str(error)]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (own, foreign))  # whole world: the verdict must be the same everywhere
    for _, message in gathered:
        if message:
            raise OtherFormatError(message)
    return sorted({problem for problems, _ in gathered for problem in problems})
