"""A run that is killed with SIGKILL at any moment and started again repeats the uninterrupted curve to the last bit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time

import pytest

from pretrain.training.metrics import read_metrics
from tests.helpers.ranks import run_ranks, train, train_on

STEPS = 30
CASES = {  # name: (ranks, overrides)
    "one rank": (1, []),
    "zero1 bf16": (2, ["parallel.zero_stage=1", "precision.compute=bf16"]),
    "zero3": (2, ["parallel.zero_stage=3"]),
    "tensor x pipeline": (4, ["parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2",
                              "parallel.zero_stage=1"]),
    "dropout": (2, ["parallel.zero_stage=1", "model.dropout=0.1", "model.attention_dropout=0.1"]),
    "offload": (2, ["parallel.zero_stage=3", "parallel.offload=optimizer",
                    f"parallel.offload_folder={tempfile.gettempdir()}"]),
    "frozen": (2, ["parallel.zero_stage=1", "precision.compute=bf16", "model.freeze=[embedding.*, blocks.0.*]"]),
    "workers": (2, ["parallel.zero_stage=2", "data.workers=2"]),
}


def losses(folder):
    return {record["step"]: (record["loss"], record["grad_norm"]) for record in read_metrics(folder / "metrics.jsonl")}


@pytest.fixture(scope="module", params=[
    pytest.param(name, marks=pytest.mark.slow, id=name.replace(" ", "-")) for name in CASES])
def uninterrupted(request, tmp_path_factory, recipe):
    world_size, overrides = CASES[request.param]
    overrides = [*overrides, f"run.steps={STEPS}", "checkpoint.every=7"]
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert train_on(world_size, recipe, [*overrides, f"run.dir={folder}"]) == [0] * world_size
    return world_size, overrides, losses(folder)


def test_killed_at_a_random_step(uninterrupted, tmp_path, recipe):
    world_size, overrides, expected = uninterrupted
    seed = random.SystemRandom().randrange(10**6)
    step = random.Random(seed).randrange(2, STEPS - 1)
    overrides = [*overrides, f"run.dir={tmp_path}"]
    with pytest.raises(AssertionError, match="died without a word"):
        run_ranks(_train_and_die, world_size, str(recipe), overrides, step)
    interrupted = losses(tmp_path)
    assert 0 < max(interrupted) < STEPS, f"seed {seed}"
    assert train_on(world_size, recipe, overrides) == [0] * world_size
    found = losses(tmp_path)
    assert list(found) == list(range(1, STEPS + 1))
    assert found == expected, f"seed {seed}, killed after step {step}"


def _train_and_die(info, config_path, overrides, step):
    """Trains, and SIGKILLs this process as soon as metrics.jsonl shows `step`: every rank at about the same time."""
    import threading
    from pathlib import Path

    folder = Path(next(item for item in overrides if item.startswith("run.dir=")).split("=", 1)[1])

    def watch():
        while True:
            if len(read_metrics(folder / "metrics.jsonl")) >= step:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.002)

    threading.Thread(target=watch, daemon=True).start()
    return train(info, config_path, overrides)


@pytest.mark.slow
def test_a_changed_layout_goes_on(tmp_path, recipe):
    """The same samples in the same steps on another layout, from a checkpoint that the first one wrote."""
    overrides = [f"run.dir={tmp_path / 'whole'}", "run.steps=20", "checkpoint.every=10"]
    assert train_on(1, recipe, overrides) == [0]
    changed = [f"run.dir={tmp_path / 'changed'}", "checkpoint.every=10", "schedule.decay_steps=20"]
    first = ["parallel.tensor=2", "parallel.sequence=true", "parallel.zero_stage=1", "run.steps=10"]
    second = ["parallel.pipeline=2", "parallel.zero_stage=1", "run.steps=20"]
    assert train_on(4, recipe, [*changed, *first]) == [0] * 4
    assert train_on(2, recipe, [*changed, *second]) == [0] * 2
    third = ["parallel.zero_stage=3", "run.steps=24"]
    assert train_on(2, recipe, [*changed, *third]) == [0] * 2
    expected, found = losses(tmp_path / "whole"), losses(tmp_path / "changed")
    assert list(found) == list(range(1, 25))
    for step, (loss, norm) in expected.items():
        assert found[step][0] == pytest.approx(loss, rel=1e-5)
        assert found[step][1] == pytest.approx(norm, rel=1e-4)


@pytest.mark.quick
def test_a_finished_run_started_again_changes_nothing(tmp_path, recipe):
    overrides = [f"run.dir={tmp_path}", "run.steps=6"]
    assert train_on(1, recipe, overrides) == [0]
    before = (tmp_path / "metrics.jsonl").read_bytes()
    assert train_on(1, recipe, overrides) == [0]
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over(tmp_path, recipe):
    overrides = [f"run.dir={tmp_path}", "run.steps=12", "checkpoint.every=4"]
    assert train_on(1, recipe, overrides) == [0]
    expected = losses(tmp_path)
    newest = tmp_path / "checkpoints" / "step-00000012" / "rank-00000.safetensors"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    assert train_on(1, recipe, overrides) == [0]
    assert losses(tmp_path) == expected


@pytest.mark.slow
def test_another_model_in_the_run_folder_is_refused(tmp_path, recipe):
    overrides = [f"run.dir={tmp_path}", "run.steps=4"]
    assert train_on(1, recipe, overrides) == [0]
    before = (tmp_path / "metrics.jsonl").read_bytes()
    changed = ["model.hidden=128", "optimizer.lr=1e-4"]
    command = [sys.executable, "-m", "pretrain", "train", str(recipe), *overrides, *changed]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "model.hidden" in result.stderr
    assert "optimizer.lr" in result.stderr
    assert "64" in result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
