"""Safetensors files, written one tensor after the other and read by ranges of elements.

Memory holds one tensor of a file that is written, and no more of a file that is read than was asked for.

The format (github.com/huggingface/safetensors, README): eight bytes of header length, little-endian; a JSON header that
names dtype, shape and offsets of each tensor; the data without gaps.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from io import FileIO
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from common.number_formats import NUMBER_FORMATS
from parallel.precision import DTYPES

MAX_HEADER_BYTES = 1 << 28
_NAMES = {DTYPES[name]: number.safetensors for name, number in NUMBER_FORMATS.items()}
_ITEM_BYTES = {number.safetensors: number.num_bytes for number in NUMBER_FORMATS.values()}


class Planned(NamedTuple):
    """A tensor that is to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def write_tensors(path: Path, planned: Sequence[Planned], tensors: Iterable[Tensor], metadata: dict[str, str]
                  ) -> str:
    """Write and flush `tensors`, in the order and the shapes of `planned`; each is taken only when its turn has come.

    Returns: the SHA-256 of the file in hexadecimal; it is taken of the bytes on their way out.

    Raises:
        ValueError: a tensor has another shape than was planned.
        OSError: the disk refused.
    """
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for plan in planned:
        begin, end = end, end + plan.num_bytes
        header[plan.name] = {"dtype": _NAMES[plan.dtype], "shape": plan.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        def write(data: bytes | memoryview) -> None:
            file.write(data)
            digest.update(data)

        write(len(text).to_bytes(8, "little") + text)
        for plan, tensor in zip(planned, tensors, strict=True):
            if tuple(tensor.shape) != tuple(plan.shape):
                raise ValueError(f"{plan.name}: planned as {plan.shape}, found {tuple(tensor.shape)}")
            write(_bytes(tensor.detach().to("cpu", plan.dtype).contiguous()))
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


class StoredTensor(NamedTuple):
    """A tensor of a file: `dtype` as the file names it, `begin` in bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int


class TensorFile:
    """A safetensors file that is read by ranges of elements. The header is read once and kept."""

    def __init__(self, path: Path):
        """
        Raises:
            OSError: the file cannot be read.
            ValueError: it is no whole safetensors file.
        """
        self.path = path
        self._file: FileIO | None = None
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                raise ValueError(f"a header of {length:,} bytes in a file of {size:,} bytes")
            header = json.loads(file.read(length))
        if not isinstance(header, dict):
            raise ValueError("its header is not a JSON object")
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        try:
            self.tensors = {name: self._stored(entry, 8 + length, size) for name, entry in header.items()}
        except (KeyError, TypeError) as error:
            raise ValueError(f"its header lacks a field ({error})") from None

    @staticmethod
    def _stored(entry: dict, data: int, size: int) -> StoredTensor:
        (begin, end), shape, dtype = entry["data_offsets"], tuple(entry["shape"]), entry["dtype"]
        if dtype in _ITEM_BYTES and end - begin != prod(shape) * _ITEM_BYTES[dtype]:
            raise ValueError(f"{end - begin:,} bytes for a tensor of shape {list(shape)} in {dtype}")
        if not 0 <= begin <= end <= size - data:
            raise ValueError(f"bytes {begin:,} to {end:,} of data, of which there are {size - data:,}")
        return StoredTensor(dtype, shape, data + begin)

    def read_into(self, name: str, start: int, target: memoryview) -> None:
        """Fill `target`, bytes, with a tensor's elements from number `start` of the flattened tensor on.

        Raises:
            OSError: the file cannot be read, or has become shorter.
        """
        if self._file is None:
            self._file = self.path.open("rb", buffering=0)
        stored = self.tensors[name]
        position = stored.begin + start * _ITEM_BYTES[stored.dtype]
        while target:
            count = os.preadv(self._file.fileno(), [target], position)
            if not count:
                raise OSError(f"{self.path} ends before byte {position + len(target):,}")
            target, position = target[count:], position + count

    def close(self) -> None:
        """Give the open file back; a later read opens it again."""
        if self._file:
            self._file.close()
            self._file = None


def in_shards(sizes_bytes: Sequence[int], most_bytes: int) -> list[range]:
    """Runs of consecutive tensors, each of at most `most_bytes` where it holds more than one."""
    shards, start, total = [], 0, 0
    for index, size in enumerate(sizes_bytes):
        if index > start and total + size > most_bytes:
            shards.append(range(start, index))
            start, total = index, 0
        total += size
    return [*shards, range(start, len(sizes_bytes))] if sizes_bytes else shards
