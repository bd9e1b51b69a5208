"""Reading a checkpoint: ranges of global tensors, whatever the layout was that wrote them."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from common.errors import CheckpointError
from parallel.tensor_slice import SliceRange, overlaps
from pretrain.checkpoint.manifest import read_manifest
from pretrain.checkpoint.tensor_file import TensorFile

MAX_OPEN_FILES = 64  # a checkpoint has a file for each rank that wrote it, and a process may open about a thousand
ITEM_BYTES = 4  # every tensor is stored in fp32


class _Stored(NamedTuple):
    """A range that a file holds, as the tensor `key`."""

    file: TensorFile
    key: str
    range: SliceRange


class Checkpoint:
    """A checkpoint opened for reading, as a `parallel.tensor_slice.Source` of the run that wrote it.

    Only the bytes of the ranges that are asked for are read.
    """

    def __init__(self, folder: Path):
        """Reads the manifest and every file's header.

        Raises:
            CheckpointError: the folder is not a whole checkpoint.
        """
        self.folder = folder
        self.manifest = read_manifest(folder)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._stored: dict[tuple[str, str], list[_Stored]] = {}
        self._open: OrderedDict[TensorFile, None] = OrderedDict()
        for entry in self.manifest["files"]:
            if entry["name"].endswith(".safetensors"):
                self._read_header(folder / entry["name"])

    def _read_header(self, path: Path) -> None:
        try:
            file = TensorFile(path)
            ranges = {key: SliceRange(**{**fields, "shape": tuple(fields["shape"])})
                      for key, fields in json.loads(file.metadata["fragments"]).items()}
            unlike = [key for key, stored in ranges.items()
                      if file.tensors[key][:2] != ("F32", (stored.count,))]
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be read ({error})") from None
        if unlike:
            raise CheckpointError(f"{path}: tensor {unlike[0]} is not as the list of fragments says")
        for key, stored in ranges.items():
            self._stored.setdefault((stored.name, stored.kind), []).append(_Stored(file, key, stored))
            self.shapes[stored.name] = stored.shape

    @property
    def adam_step(self) -> int:
        """The number of optimizer steps behind the stored moments."""
        return self.manifest["adam_step"]

    def incomplete(self) -> list[str]:
        """Tensors whose fragments do not add up to the whole, without reading them."""
        problems = []
        for (name, kind), stored in self._stored.items():
            held, whole = sum(part.range.count for part in stored), SliceRange.whole(name, self.shapes[name]).count
            if held != whole:
                problems.append(f"{self.folder}: the fragments of {name} ({kind}) hold {held} elements of {whole}")
        return problems

    def read(self, wanted: SliceRange) -> Tensor:
        """The elements of a range, fp32 on the CPU; a range of any slicing.

        Raises:
            CheckpointError: the tensor is not there, has another shape, or its fragments leave a gap.
        """
        stored = self._stored.get((wanted.name, wanted.kind))
        if not stored:
            raise CheckpointError(f"{self.folder}: holds no {wanted.kind} of {wanted.name}")
        shape = self.shapes[wanted.name]
        if shape != wanted.shape:
            raise CheckpointError(f"{self.folder}: {wanted.name} has the shape {list(shape)}, in this run it has "
                                  f"{list(wanted.shape)}; set the lengths in the section model as they were")
        found, covered = torch.empty(wanted.count), 0
        target = found.numpy().data.cast("B")
        for part in stored:
            for same in overlaps(wanted, part.range):
                self._read_into(part, same.held,
                                target[same.wanted * ITEM_BYTES : (same.wanted + same.num_elements) * ITEM_BYTES])
                covered += same.num_elements
        if covered != wanted.count:
            raise CheckpointError(f"{self.folder}: the fragments of {wanted.name} ({wanted.kind}) hold {covered} "
                                  f"elements of {wanted.count}")
        return found

    def tensor(self, name: str, kind: str = "weight") -> Tensor:
        """A whole global tensor, fp32 on the CPU. Raises CheckpointError as `read` does."""
        if name not in self.shapes:
            raise CheckpointError(f"{self.folder}: holds no {kind} of {name}")
        return self.read(SliceRange.whole(name, self.shapes[name], kind)).view(self.shapes[name])

    def _read_into(self, part: _Stored, start: int, target: memoryview) -> None:
        """Read elements of a stored tensor; the file stays open for the next read."""
        if part.file not in self._open:
            while len(self._open) >= MAX_OPEN_FILES:
                self._open.popitem(last=False)[0].close()
            self._open[part.file] = None
        self._open.move_to_end(part.file)
        try:
            part.file.read_into(part.key, start, target)
        except OSError as error:
            raise CheckpointError(f"{part.file.path}: cannot be read ({error})") from None

    def close(self) -> None:
        """Close the files and forget where tensors are; the manifest stays. Nothing can be read afterwards."""
        self._stored.clear()
        while self._open:
            self._open.popitem()[0].close()


class StartWeights:
    """The source of a new run that starts with the weights of a checkpoint: no moments, and any vocabulary padding."""

    adam_step = 0

    def __init__(self, checkpoint: Checkpoint):
        model = checkpoint.manifest["config"]["model"]
        self.checkpoint = checkpoint
        self.num_rows = model["vocab_size"]
        self.num_padded_rows = -(-model["vocab_size"] // model["pad_vocab_to"]) * model["pad_vocab_to"]

    def read(self, wanted: SliceRange) -> Tensor | None:
        """The weights of a range, None for moments; rows that pad the vocabulary are zeros where their number changed.

        Raises:
            CheckpointError: the tensor is not there, or has another shape.
        """
        if wanted.kind != "weight":
            return None
        shape = self.checkpoint.shapes.get(wanted.name, wanted.shape)
        repadded = shape != wanted.shape and shape[:1] == (self.num_padded_rows,) and shape[1:] == wanted.shape[1:] \
            and wanted.shape[0] >= self.num_rows
        return self._read_rows(wanted, shape) if repadded else self.checkpoint.read(wanted)

    def close(self) -> None:
        """Close the checkpoint. Nothing can be read afterwards."""
        self.checkpoint.close()

    def _read_rows(self, wanted: SliceRange, shape: tuple[int, ...]) -> Tensor:
        """A range of a tensor with as many rows as the vocabulary, of which the checkpoint holds a different number.

        An element of the flattened tensor has the same place in both: they differ at the end.
        """
        stored = SliceRange.whole(wanted.name, shape)
        end = stored.count // shape[0] * self.num_rows
        found, done = torch.zeros(wanted.count), 0
        for start, length in wanted.runs():
            count = min(length, end - start)
            if count > 0:
                found[done : done + count] = self.checkpoint.read(stored.part(start, count))
            done += length
        return found
