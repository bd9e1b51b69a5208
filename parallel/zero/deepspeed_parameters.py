"""What DeepSpeed hangs on a model's parameters, as far as we read it."""

from __future__ import annotations

from enum import Enum
from typing import Any, Protocol, cast

from torch import nn


class Zero3Parameter(Protocol):
    """A parameter that `zero.Init` has cut over the replicas.

    Attributes:
        ds_tensor: this replica's piece, a tensor whose `status` says whether it is in memory.
        ds_numel: elements of the whole parameter.
        ds_persist: whether it is kept gathered between steps.
        ds_status: whether it is gathered now.
    """

    ds_tensor: Any
    ds_numel: int
    ds_persist: bool
    ds_status: Enum

    def partition_numel(self) -> int:
        """Elements of one replica's piece, padding included."""


class MappedParameter(Protocol):
    """A parameter of which ZeRO 1 or 2, or the bf16 optimizer, may own a piece on this rank.

    Attributes:
        _hp_mapping: where the piece lies in the flat fp32 partition of its group; None where this rank owns none.
        _index_in_param_group: its place among the parameters of its group.
    """

    _hp_mapping: Any
    _index_in_param_group: int


def zero3(parameter: nn.Parameter) -> Zero3Parameter:
    """A parameter of ZeRO-3 with what DeepSpeed keeps on it."""
    return cast(Zero3Parameter, parameter)


def mapped(parameter: nn.Parameter) -> MappedParameter:
    """A parameter of ZeRO 1 or 2, or of the bf16 optimizer, with what DeepSpeed keeps on it."""
    return cast(MappedParameter, parameter)
