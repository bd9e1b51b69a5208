"""What offload needs of a machine, told before anything is started."""

import pytest
import torch

from parallel.zero import adamw, lacking_for_offload


def test_a_missing_compiler_is_named_with_the_remedy(monkeypatch):
    assert lacking_for_offload("optimizer", "cpu") is None
    monkeypatch.setenv("CXX", "/nowhere/c++")
    told = lacking_for_offload("optimizer", "cpu")
    assert "/nowhere/c++ cannot be found" in told
    assert "apt-get install g++" in told
    assert "parallel.offload=none" in told
    assert lacking_for_offload("none", "cpu") is None


def test_parameters_stay_where_there_is_no_accelerator():
    assert "parallel.offload=optimizer" in lacking_for_offload("parameters", "cpu")
    assert lacking_for_offload("parameters", "cuda") is None


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_both_kinds_of_adam_agree(decay):
    """Five steps with weight decay and the correction of young moments."""
    weights, optimizers = [], []
    for offload in ("none", "optimizer"):
        weight = torch.nn.Parameter(torch.linspace(-1, 1, 1000))
        group = {"params": [weight], "weight_decay": decay}
        optimizers.append(adamw(offload)([group], lr=1e-2, betas=(0.9, 0.95), eps=1e-8))
        weights.append(weight)
    for step in range(5):
        for weight, optimizer in zip(weights, optimizers, strict=True):
            weight.grad = torch.sin(torch.arange(1000.0) * (step + 1))
            optimizer.step()
    assert torch.allclose(*weights, rtol=1e-5, atol=1e-6)
    assert not torch.equal(weights[0], torch.linspace(-1, 1, 1000))


def test_a_step_after_a_restart_has_the_same_bits():
    """Steps taken one after the other, and each again as the first one of a fresh optimizer's counter would be."""
    weight, again = torch.nn.Parameter(torch.linspace(-1, 1, 1000)), torch.nn.Parameter(torch.zeros(1000))
    running, resumed = (adamw("optimizer")([p], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
                        for p in (weight, again))
    taken = []
    for step in range(40):
        weight.grad = torch.sin(torch.arange(1000.0) * (step + 1))
        before = {key: value.clone() if key != "step" else value for key, value in running.state[weight].items()}
        taken.append((weight.detach().clone(), weight.grad, before))
        running.step()
    after = [entry[0] for entry in taken[1:]] + [weight.detach()]
    for (start, gradient, state), end in list(zip(taken, after, strict=True))[:0:-1]:  # backwards
        again.data.copy_(start)
        again.grad, resumed.state[again] = gradient, state
        resumed.step()
        assert torch.equal(again, end), f"step {state['step']}"
