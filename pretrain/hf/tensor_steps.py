"""The steps of a name map, applied to a tensor in both directions; a copy is made only where a step needs one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pretrain.models.hf_map import Grouped, Joined, Rows, Shaped, Step, Transposed

Parts = list[Tensor]


def to_theirs(tensor: Tensor, steps: Sequence[Step]) -> Parts:
    """The tensors of transformers that one of ours becomes. On the device `meta` this gives their shapes."""
    parts = [tensor]
    for step in steps:
        parts = _WAYS[type(step)][0](parts, step)
    return parts


def to_ours(parts: Parts, steps: Sequence[Step]) -> Tensor:
    """The tensor of ours that these tensors of transformers become."""
    for step in reversed(steps):
        parts = _WAYS[type(step)][1](parts, step)
    return parts[0]


def _split_groups(parts: Parts, step: Grouped) -> Parts:
    rest = parts[0].shape[1:]
    by_group = parts[0].reshape(step.groups, sum(step.widths), *rest)
    return [part.reshape(-1, *rest) for part in by_group.split(step.widths, dim=1)]


def _fuse_groups(parts: Parts, step: Grouped) -> Parts:
    by_group = [part.reshape(step.groups, width, *part.shape[1:])
                for part, width in zip(parts, step.widths, strict=True)]
    return [torch.cat(by_group, dim=1).flatten(0, 1)]


def _transpose(parts: Parts, step: Transposed) -> Parts:
    return [part.t() if part.dim() == 2 else part for part in parts]


def _add_rows(parts: Parts, step: Rows) -> Parts:
    if (step.start, step.stop) == (0, step.total):
        return parts
    whole = parts[0].new_zeros(step.total, *parts[0].shape[1:])
    whole[step.start : step.stop] = parts[0]
    return [whole]


_WAYS: dict[type, tuple[Callable[..., Parts], Callable[..., Parts]]] = {  # to theirs, to ours
    Grouped: (_split_groups, _fuse_groups),
    Joined: (lambda parts, step: [torch.cat(parts)], lambda parts, step: list(parts[0].split(step.sizes))),
    Transposed: (_transpose, _transpose),
    Rows: (lambda parts, step: [parts[0][step.start : step.stop]], _add_rows),
    Shaped: (lambda parts, step: [parts[0].reshape(step.theirs)], lambda parts, step: [parts[0].reshape(step.ours)]),
}
