"""Layers that share all parameters with an earlier one: one module under one name, and a copy on another stage."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from parallel.pipeline_stages import LayerSpec, Stage


def linear() -> nn.Linear:
    layer = nn.Linear(4, 4)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(16.0).view(4, 4) / 30)
        layer.bias.fill_(0.1)
    return layer


def specs_of(num_layers: int) -> list[LayerSpec]:
    return [LayerSpec("first", linear),
            *(LayerSpec(f"layer{number}", linear, same_as="first") for number in range(1, num_layers))]


def test_one_module_serves_all_layers():
    stage, x = Stage(specs_of(3), (0, 3)), torch.ones(2, 4)
    assert [name for name, _ in stage.named_global_parameters()] == ["first.weight", "first.bias"]
    assert stage.by_name["first"] is stage.by_name["layer2"]
    alone = linear()
    alone(alone(alone(x))).square().sum().backward()
    stage.run(x).square().sum().backward()
    assert torch.equal(stage.by_name["first"].weight.grad, alone.weight.grad)
    assert stage.borrowed() == set()


def test_another_stage_has_a_copy_under_the_same_name():
    stages, x = [Stage(specs_of(3), (0, 1)), Stage(specs_of(3), (1, 3))], torch.ones(2, 4)
    assert stages[1].borrowed() == {"first.weight", "first.bias"}
    between = stages[0].run(x)
    received = between.detach().requires_grad_()
    stages[1].run(received).square().sum().backward()
    between.backward(received.grad)
    whole = Stage(specs_of(3), (0, 3))
    whole.run(x).square().sum().backward()
    parts = [dict(stage.named_global_parameters())["first.weight"].grad for stage in stages]
    assert torch.allclose(parts[0] + parts[1], whole.by_name["first"].weight.grad, rtol=1e-6)


@pytest.mark.parametrize("also", [{"tied_to": "table"}, {"cached": True}])
def test_what_a_shared_layer_cannot_be(also):
    with pytest.raises(ValueError, match="neither tied nor cached"):
        LayerSpec("second", linear, same_as="first", **also)
