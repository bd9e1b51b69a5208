"""The formats of floating-point numbers, and the names that other projects give them."""

from __future__ import annotations

from typing import NamedTuple


class NumberFormat(NamedTuple):
    """A format's width, and its name in torch and in the header of a safetensors file."""

    num_bytes: int
    torch: str
    safetensors: str


NUMBER_FORMATS = {  # by the name in configs and on the command line
    "fp32": NumberFormat(4, "float32", "F32"),
    "bf16": NumberFormat(2, "bfloat16", "BF16"),
    "fp16": NumberFormat(2, "float16", "F16"),
}
