"""Save and load: every rank writes what it owns aside, rank 0 publishes with one rename; any layout reads it back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from common.errors import CheckpointError, StorageError
from common.files import flush, sha256_of
from parallel.zero.optimizer_state import OwnedFragment
from pretrain.checkpoint.manifest import (
    FORMAT,
    damaged_files,
    folder_name,
    package_versions,
    published,
    read_manifest,
    write_manifest,
)


def save(checkpoints: Path, step: int, fragments: Iterable[OwnedFragment], facts: dict[str, Any], keep: int,
         companions: Iterable[Path] = ()) -> Path:
    """Write the checkpoint of one step; called by every rank together.

    Args:
        checkpoints: the run's checkpoint folder, shared by all ranks.
        fragments: what this rank owns.
        facts: what the manifest says besides files (config, layout, position ..); equal on all ranks.
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
    content = None
    if rank == 0:
        files = [entry for entry in entries if entry]
        content = {"format": FORMAT, "step": step, "files": files, "versions": package_versions(), **facts}
    _together(lambda: _publish(aside, final, content, keep, companions) if rank == 0 else None,
              f"cannot publish {final}")
    return final


def _together(work, what: str) -> list[Any]:
    """Run `work` on every rank and gather the results; a failure on one is raised on all, so that none waits."""
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
    tensors: dict[str, Tensor] = {}
    index: dict[str, dict[str, Any]] = {}
    for number, fragment in enumerate(fragments):
        key = f"{number:06d}"
        tensors[key] = fragment.tensor.detach().to("cpu", torch.float32).contiguous()
        index[key] = {
            "name": fragment.name, "kind": fragment.kind, "shape": fragment.global_shape,
            "slice_dim": fragment.slice_dim, "slice_rank": fragment.slice_rank, "slice_size": fragment.slice_size,
            "start": fragment.start, "count": fragment.tensor.numel(),
        }
    if not tensors:
        return None
    path = aside / f"rank-{rank:05d}.safetensors"
    try:
        save_file(tensors, path, metadata={"fragments": json.dumps(index)})
    except SafetensorError as error:  # its way of saying that the disk refused
        raise OSError(str(error)) from error
    flush(path)
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _publish(aside: Path, final: Path, content: dict[str, Any], keep: int, companions: Iterable[Path]) -> None:
    for source in companions:
        copy = Path(shutil.copyfile(source, aside / source.name))
        flush(copy)
        content["files"].append({"name": copy.name, "bytes": copy.stat().st_size, "sha256": sha256_of(copy)})
    write_manifest(aside, content)
    flush(aside)
    replaced = final.with_name(f"{final.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():  # one of the same step that did not verify; it goes only once the new one has its name
        final.rename(replaced)
    aside.rename(final)
    flush(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    for old in published(final.parent)[keep:]:
        shutil.rmtree(old, ignore_errors=True)


class Checkpoint:
    """A checkpoint opened for reading: whole global tensors by name and kind, in fp32."""

    def __init__(self, folder: Path):
        """Reads the manifest and every file's header.

        Raises:
            CheckpointError: the folder is not a whole checkpoint.
        """
        self.folder = folder
        self.manifest = read_manifest(folder)
        self._places: dict[tuple[str, str], list[tuple[Path, str, dict]]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for entry in self.manifest["files"]:
            path = folder / entry["name"]
            if path.suffix != ".safetensors":
                continue
            try:
                with safe_open(path, framework="pt") as file:
                    index = json.loads(file.metadata()["fragments"])
            except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
                raise CheckpointError(f"{path}: cannot be read ({error})") from None
            for key, place in index.items():
                self._places.setdefault((place["name"], place["kind"]), []).append((path, key, place))
                self.shapes[place["name"]] = tuple(place["shape"])

    def incomplete(self) -> list[str]:
        """Tensors whose fragments do not add up to the whole, without reading them."""
        problems = []
        for (name, kind), places in self._places.items():
            held, whole = sum(place["count"] for *_, place in places), torch.Size(self.shapes[name]).numel()
            if held != whole:
                problems.append(f"{self.folder}: the fragments of {name} ({kind}) hold {held} elements of {whole}")
        return problems

    def tensor(self, name: str, kind: str = "weight") -> Tensor:
        """The whole global tensor, fp32 on the CPU.

        Raises:
            CheckpointError: the tensor is not there, or its fragments leave a gap.
        """
        places = self._places.get((name, kind))
        if not places:
            raise CheckpointError(f"{self.folder}: holds no {kind} of {name}")
        whole = torch.empty(self.shapes[name])
        covered = 0
        slices = {(p["slice_rank"], p["slice_size"], p["slice_dim"]) for *_, p in places}
        for slice_rank, slice_size, slice_dim in slices:
            part = whole
            if slice_dim is not None and slice_size > 1:
                length = whole.shape[slice_dim] // slice_size
                part = whole.narrow(slice_dim, slice_rank * length, length)
            flat = part.view(-1) if part.is_contiguous() else torch.empty(part.numel())
            for path, key, place in places:
                if place["slice_rank"] == slice_rank:
                    with safe_open(path, framework="pt") as file:
                        flat[place["start"] : place["start"] + place["count"]] = file.get_tensor(key)
                    covered += place["count"]
            if not part.is_contiguous():
                part.copy_(flat.view(part.shape))
        if covered != whole.numel():
            raise CheckpointError(f"{self.folder}: the fragments of {name} ({kind}) hold {covered} elements of "
                                  f"{whole.numel()}")
        return whole


def starting_weights(checkpoint: Checkpoint) -> Callable[[str, str, tuple[int, ...]], Tensor | None]:
    """What `Engine.fill` takes a new run's state from: weights only, with padding of the vocabulary as it is asked for.

    The callable raises CheckpointError for a tensor of another shape.
    """
    model = checkpoint.manifest["config"]["model"]
    padded = -(-model["vocab_size"] // model["pad_vocab_to"]) * model["pad_vocab_to"]

    def source(name: str, kind: str, shape: tuple[int, ...]) -> Tensor | None:
        if kind != "weight":
            return None
        weight = checkpoint.tensor(name)
        if weight.shape != shape and weight.shape[:1] == (padded,) and weight.shape[1:] == shape[1:] \
                and shape[0] >= model["vocab_size"]:
            resized = weight.new_zeros(shape)
            resized[: model["vocab_size"]] = weight[: model["vocab_size"]]
            return resized
        if weight.shape != shape:
            raise CheckpointError(f"{checkpoint.folder}: {name} has the shape {list(weight.shape)}, in this run it has "
                                  f"{list(shape)}; set the lengths in the section model as they were")
        return weight

    return source


def newest_whole(checkpoints: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies and why newer ones were passed over; called by every rank together.

    Raises:
        CheckpointError: checkpoints exist and none verifies; a run never starts from zero over them.
    """
    rejected: list[str] = []
    candidates = published(checkpoints) if dist.get_rank() == 0 else []
    shared: list[Any] = [candidates]
    dist.broadcast_object_list(shared, src=0)  # whole world: all must look at the same list
    for folder in shared[0]:
        problems = _verify_together(folder)
        if not problems:
            return Checkpoint(folder), rejected
        rejected += problems
    if rejected:
        listed = "\n  ".join(rejected[:10])
        raise CheckpointError(f"no checkpoint in {checkpoints} can be used:\n  {listed}\nRepair or move them away, or "
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
    """Each rank hashes its share of the files; the problems of all, on all."""
    try:
        files = read_manifest(folder)["files"]
        own = damaged_files(folder, files[dist.get_rank() :: dist.get_world_size()])
    except CheckpointError as error:
        own = [str(error)]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, own)  # whole world: the verdict must be the same everywhere
    return sorted({problem for problems in gathered for problem in problems})
