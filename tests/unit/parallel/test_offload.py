"""What offload needs of a machine, told before anything is started."""

import pytest
import torch

from parallel.config import ParallelConfig
from parallel.zero.host_adam import adamw
from parallel.zero.offload import MappedFiles, NoRoom, lacking_for_offload


def lacking(offload: str, device_type: str, folder: str = "") -> str | None:
    parallel = ParallelConfig(micro_batch=1, global_batch=1, offload=offload, offload_folder=folder)
    return lacking_for_offload(parallel, device_type)


def test_a_missing_compiler_is_named_with_the_remedy(monkeypatch):
    assert lacking("optimizer", "cpu") is None
    monkeypatch.setenv("CXX", "/nowhere/c++")
    told = lacking("optimizer", "cpu")
    assert "/nowhere/c++ cannot be found" in told
    assert "apt-get install g++" in told
    assert "parallel.offload=none" in told
    assert lacking("none", "cpu") is None


def test_parameters_stay_where_there_is_no_accelerator():
    assert "parallel.offload=optimizer" in lacking("parameters", "cpu")
    assert lacking("parameters", "cuda") is None


def test_a_folder_that_cannot_be_written(tmp_path):
    assert lacking("optimizer", "cpu", str(tmp_path)) is None
    (tmp_path / "file").touch()
    for name in ("missing", "file"):
        told = lacking("optimizer", "cpu", str(tmp_path / name))
        assert f"parallel.offload_folder={tmp_path / name}" in told
        assert "local disk" in told


def test_mapped_files_hold_values_and_leave_nothing(tmp_path):
    files = MappedFiles(str(tmp_path))
    mapped = files.zeros_like(torch.ones(3, 5))
    assert torch.equal(mapped, torch.zeros(3, 5))
    mapped += 2
    assert torch.equal(mapped, torch.full((3, 5), 2.0))
    assert files.zeros_like(torch.ones(0)).numel() == 0
    assert not list(tmp_path.iterdir())


def test_a_full_disc_is_told_before_the_first_write(tmp_path):
    with pytest.raises(NoRoom, match="more data ranks"):
        MappedFiles(str(tmp_path)).zeros_like(torch.empty(1 << 55, device="meta"))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
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


@pytest.mark.slow
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
