"""Writing a safetensors file one tensor after the other, so that memory holds one of them and not the file.

The format (github.com/huggingface/safetensors, README): eight bytes of header length, little-endian; a JSON header that
names dtype, shape and offsets of each tensor; the data without gaps.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class Planned(NamedTuple):
    """A tensor that is to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_tensors(path: Path, planned: Sequence[Planned], tensors: Iterable[Tensor], metadata: dict[str, str]) -> None:
    """Write `tensors`, in the order and the shapes of `planned`; each is taken only when its turn has come.

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
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for plan, tensor in zip(planned, tensors, strict=True):
            if tuple(tensor.shape) != tuple(plan.shape):
                raise ValueError(f"{plan.name}: planned as {plan.shape}, found {tuple(tensor.shape)}")
            flat = tensor.detach().to("cpu", plan.dtype).contiguous().reshape(-1)
            file.write(memoryview(flat.view(torch.uint8).numpy()))


def in_shards(sizes_bytes: Sequence[int], most_bytes: int) -> list[range]:
    """Runs of consecutive tensors, each of at most `most_bytes` where it holds more than one."""
    shards, start, total = [], 0, 0
    for index, size in enumerate(sizes_bytes):
        if index > start and total + size > most_bytes:
            shards.append(range(start, index))
            start, total = index, 0
        total += size
    return [*shards, range(start, len(sizes_bytes))] if sizes_bytes else shards
