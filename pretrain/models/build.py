"""From a family's config to layers: the one place that imports a family's modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module

import torch
from torch import Tensor

from parallel.pipeline_stages import LayerSpec, Stage
from parallel.process_groups import Groups
from parallel.tensor_parallel import TensorParallel
from parallel.tensor_slice import SliceRange
from pretrain.models import FAMILIES, family_spec
from pretrain.models.family import FamilyConfig


def layer_list(model: FamilyConfig, tp: TensorParallel, num_predictions: int | None = None) -> list[LayerSpec]:
    """The ordered layers of a model on a tensor axis, each with its cost for the pipeline cut.

    Args:
        num_predictions: tokens of a sample for which the head makes logits; None: all (`FamilySpec.ends`).
    """
    shapes = family_spec(model.family).layer_shapes(model, num_predictions)
    specs = import_module(f"{FAMILIES[model.family]}.modules").layers(model, tp)
    return [replace(spec, cost=float(shapes[spec.name].cost)) for spec in specs]


def build_stage(model: FamilyConfig, groups: Groups | None, device: torch.device) -> Stage:
    """All layers as one stage; matrices sliced over the tensor axis of `groups`. Weights are not filled.

    With `groups` None the layers know of no other rank: enough for names.
    """
    with torch.device(device):
        specs = layer_list(model, TensorParallel(groups, device))
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
