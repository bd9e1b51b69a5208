"""Stages behind one another compute what the whole model does, forward and backward, wherever the cut is.

Nothing is sent here: the outputs of a stage are cut from its graph and handed on, as the pipeline engine does.
"""

from __future__ import annotations

from binascii import crc32
from importlib import import_module

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from parallel.pipeline_stages import LayerSpec, Stage
from parallel.single_rank import single_rank
from parallel.tensor_parallel import TensorParallel
from pretrain.config.run_config import config_from
from pretrain.models import FAMILIES
from tests.helpers.recipes import recipe_of

INPUTS = {
    "gpt": lambda: ids(3, 32),
    "t5": lambda: (ids(3, 32), ids(3, 12), torch.ones(3, 32, dtype=torch.long)),
    "bart": lambda: (ids(3, 32), ids(3, 32), torch.ones(3, 32, dtype=torch.long)),
    "bert": lambda: (ids(3, 32), torch.zeros(3, 32, dtype=torch.long), torch.arange(12).view(3, 4)),
}


def ids(*shape: int) -> Tensor:
    return torch.randint(500, shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def alone():
    with single_rank() as groups:
        yield groups


def specs_of(groups, family: str) -> list[LayerSpec]:
    config = config_from({**recipe_of(family), "data": {"train": "none"}}, "test")
    layers = import_module(f"{FAMILIES[family]}.modules").layers
    return list(layers(config.model, TensorParallel(groups, torch.device("cpu"))))


def stage_of(specs: list[LayerSpec], begin: int, end: int) -> Stage:
    """A stage whose weights are a function of their global names."""
    stage = Stage(specs, (begin, end))
    with torch.no_grad():
        for name, parameter in stage.named_global_parameters():
            parameter.normal_(0.1, 0.2, generator=torch.Generator().manual_seed(crc32(name.encode())))
    return stage


def floats(state) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(state) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def cut_from_graph(state):
    return tree_map(lambda leaf: leaf.detach().requires_grad_() if leaf.is_floating_point() else leaf, state)


def through(stages: list[Stage], state) -> tuple[list[Tensor], dict[str, Tensor]]:
    """(outputs of the last stage, gradients by global name); copies of a tied weight on two stages are summed."""
    inputs, outputs = [], []
    for stage in stages:
        inputs.append(cut_from_graph(state) if inputs else state)
        state = stage.run(inputs[-1])
        outputs.append(floats(state))
    gradients = [torch.randn(out.shape, generator=torch.Generator().manual_seed(2)) for out in outputs[-1]]
    for received, sent in zip(reversed(inputs), reversed(outputs), strict=True):
        torch.autograd.backward(sent, gradients)
        gradients = [leaf.grad for leaf in floats(received)]
    summed: dict[str, Tensor] = {}
    for stage in stages:
        for name, parameter in stage.named_global_parameters():
            if parameter.grad is not None:
                summed[name] = summed.get(name, 0) + parameter.grad
    return outputs[-1], summed


@pytest.mark.parametrize("family", INPUTS)
def test_stages_compute_what_the_whole_model_does(family, alone):
    specs = specs_of(alone, family)
    expected, expected_gradients = through([stage_of(specs, 0, len(specs))], INPUTS[family]())
    places = [place for place in range(1, len(specs)) if not specs[place - 1].with_next]
    for places_of_cut in (*((place,) for place in places), tuple(places)):  # each boundary alone, then all of them
        bounds = [0, *places_of_cut, len(specs)]
        stages = [stage_of(specs, begin, end) for begin, end in zip(bounds[:-1], bounds[1:], strict=True)]
        found, gradients = through(stages, INPUTS[family]())
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b), f"cut at {places_of_cut}"
        assert gradients.keys() == expected_gradients.keys(), f"cut at {places_of_cut}"
        for name, gradient in gradients.items():
            bound = 1e-5 * expected_gradients[name].abs().max()
            assert (gradient - expected_gradients[name]).abs().max() <= bound, f"{name}, cut at {places_of_cut}"
