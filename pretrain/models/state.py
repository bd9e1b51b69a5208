"""The state between layers: a NamedTuple inside a layer, a plain tuple of tensors on its way to the next.

DeepSpeed's pipeline engine sends a tensor or a tuple of tensors from stage to stage, without our classes and without
None. So a layer names the parts of the state at its door (`opened`) and gives plain tensors back (`handed_on`); the
parts that may be absent stand last in each NamedTuple.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

from torch import Tensor

State = Tensor | tuple[Tensor, ...]
Parts = TypeVar("Parts")


def opened(kind: Callable[..., Parts], state: State) -> Parts:
    """The state as the NamedTuple `kind`; absent parts are None."""
    return kind(*state) if isinstance(state, tuple) else kind(state)


def handed_on(parts: tuple[Tensor | None, ...]) -> State:
    """The parts that are there, as a layer gives them to the next: a tensor where there is one, else a tuple."""
    present = tuple(part for part in parts if part is not None)
    return present if len(present) > 1 else present[0]


class EncoderState(NamedTuple):
    """Between the layers of the encoder, in a family of encoder and decoder."""

    x: Tensor  # source ids int64 [b, s], their rows [b, s, h], then [s(/tp), b, h]
    decoder_ids: Tensor  # int64 [b, t]
    mask: Tensor | None = None  # int64 [b, s], 0 for padding of the source


class DecoderState(NamedTuple):
    """Between the layers of the decoder, in a family of encoder and decoder."""

    x: Tensor  # [t(/tp), b, h]
    memory: Tensor | None = None  # the encoder's output [s(/tp), b, h]; absent behind the last block
    mask: Tensor | None = None  # int64 [b, s], 0 for padding of the source
