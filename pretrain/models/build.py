"""A model built whole on this rank, outside of training: for use, and for what its tensors are called and shaped."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import torch
from torch import Tensor

from parallel.pipeline_stages import Stage
from parallel.process_groups import Groups
from parallel.tensor_parallel import TensorParallel
from parallel.tensor_slice import SliceRange
from pretrain.models import FAMILIES
from pretrain.models.family import FamilyConfig


def build_stage(model: FamilyConfig, groups: Groups, device: torch.device) -> Stage:
    """All layers as one stage; matrices sliced over the tensor axis of `groups`. Weights are not filled."""
    modules = import_module(f"{FAMILIES[model.family]}.modules")
    with torch.device(device):
        specs = modules.layers(model, TensorParallel(groups, device))
        return Stage(specs, (0, len(specs)))


def filled_stage(model: FamilyConfig, groups: Groups, device: torch.device, read: Callable[[SliceRange], Tensor]
                 ) -> Stage:
    """The same in evaluation mode with weights in fp32; `read` gives the elements of a range, flat.

    Only the slices of this tensor rank are read.
    """
    stage = build_stage(model, groups, device)
    at, degree = groups.coordinates, groups.layout.tensor
    with torch.no_grad():
        for name, own, slice_dim in stage.named_global_tensors():
            shape = list(own.shape)
            if slice_dim is not None:
                shape[slice_dim] *= degree
            own.copy_(read(SliceRange.slice(name, tuple(shape), slice_dim, rank=at.tp, size=degree)).view(own.shape))
    return stage.eval()


def global_shapes(model: FamilyConfig, groups: Groups) -> dict[str, tuple[int, ...]]:
    """Global name and shape of every tensor, in the order of the layers; nothing is allocated.

    `groups` are those of a single rank.
    """
    stage = build_stage(model, groups, torch.device("meta"))
    return {name: tuple(tensor.shape) for name, tensor, _ in stage.named_global_tensors()}
