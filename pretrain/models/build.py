"""A model built whole on this rank, outside of training: for use, and for what its tensors are called and shaped."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import torch
from torch import Tensor

from parallel.parameter_plan import slice_of
from parallel.pipeline_stages import Stage
from parallel.process_groups import Groups
from parallel.tensor_parallel import TensorParallel
from pretrain.models import FAMILIES
from pretrain.models.family import FamilyConfig


def build_stage(model: FamilyConfig, groups: Groups | None, device: torch.device) -> Stage:
    """All layers as one stage; matrices sliced over the tensor axis of `groups`. Weights are not filled.

    With `groups` None the layers know of no other rank: enough for names.
    """
    modules = import_module(f"{FAMILIES[model.family]}.modules")
    with torch.device(device):
        specs = modules.layers(model, TensorParallel(groups, device))
        return Stage(specs, (0, len(specs)))


def filled_stage(model: FamilyConfig, groups: Groups, device: torch.device, tensor: Callable[[str], Tensor]) -> Stage:
    """The same in evaluation mode with weights in fp32; `tensor` gives whole tensors by global name."""
    stage = build_stage(model, groups, device)
    at, degree = groups.coordinates, groups.layout.tensor
    with torch.no_grad():
        for name, own, slice_dim in stage.named_global_tensors():
            own.copy_(slice_of(tensor(name), slice_dim, at.tp, degree))
    return stage.eval()


def global_shapes(model: FamilyConfig, groups: Groups) -> dict[str, tuple[int, ...]]:
    """Global name and shape of every tensor, in the order of the layers; nothing is allocated.

    `groups` are those of a single rank.
    """
    stage = build_stage(model, groups, torch.device("meta"))
    return {name: tuple(tensor.shape) for name, tensor, _ in stage.named_global_tensors()}
