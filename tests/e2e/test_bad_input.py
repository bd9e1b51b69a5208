"""Mistakes through the real command: exit code, key, numbers and change; no traceback, no rank left."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CASES = {  # name: (ranks, overrides, what the message must hold)
    "wrong type": (1, ["run.steps=many"], ["run.steps", "many"]),
    "unknown key": (1, ["parallel.tensr=2"], ["parallel.tensr", "parallel.tensor"]),
    "world does not factor": (3, ["parallel.tensor=2"], ["3 ranks", "tensor=2", "2 or 4"]),
    "heads by tensor": (8, ["parallel.tensor=8"], ["4 attention heads", "tensor=8", "1, 2, 4"]),
    "global batch": (3, [], ["global_batch", "8"]),
    "layers below stages": (8, ["parallel.pipeline=8", "parallel.zero_stage=1"], ["4", "pipeline=8"]),
    "zero2 with a pipeline": (2, ["parallel.pipeline=2", "parallel.zero_stage=2"], ["zero_stage=2", "zero_stage=1"]),
    "no dataset": (1, ["data.train=/nowhere"], ["data.train", "/nowhere"]),
    "fp16 on a cpu": (1, ["precision.compute=fp16", "parallel.zero_stage=1"], ["fp16", "bf16"]),
    "weights offloaded on a cpu": (1, ["parallel.offload=parameters", "parallel.zero_stage=3"],
                                   ["needs an accelerator", "parallel.offload=optimizer"]),
    "offload into no folder": (2, ["parallel.offload=optimizer", "parallel.offload_folder=/nowhere",
                                   "parallel.zero_stage=2"], ["parallel.offload_folder=/nowhere", "local disk"]),
    "no such config": (1, None, ["missing.yaml"]),
}


def trainyard(*arguments, **variables):
    return subprocess.run([sys.executable, "-m", "pretrain", *arguments], capture_output=True, text=True, check=False,
                          timeout=300, env={**os.environ, **variables})


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_mistake(name, tmp_path, recipe):
    num_ranks, overrides, wanted = CASES[name]
    config = str(recipe) if overrides is not None else str(tmp_path / "missing.yaml")
    result = trainyard("train", config, "--nproc", str(num_ranks), f"run.dir={tmp_path / 'run'}", *(overrides or []))
    assert result.returncode == 2, result.stderr
    for part in wanted:
        assert part in result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_offload_without_a_compiler(tmp_path, recipe):
    result = trainyard("train", str(recipe), "--nproc", "2", f"run.dir={tmp_path / 'run'}", "parallel.zero_stage=1",
                       "parallel.offload=optimizer", CXX="/nowhere/c++")
    assert result.returncode == 2
    for part in ("/nowhere/c++", "apt-get install g++", "parallel.offload=none"):
        assert part in result.stderr
    assert "Traceback" not in result.stdout + result.stderr


@pytest.mark.slow
def test_missing_shard(tmp_path, recipe, dataset):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(dataset / "train", copy)
    shard = next(copy.glob("*.tar"))
    shard.unlink()
    result = trainyard("train", str(recipe), "--nproc", "2", f"run.dir={tmp_path / 'run'}", f"data.train={copy}")
    assert result.returncode == 65
    assert shard.name in result.stderr
    assert "Traceback" not in result.stdout + result.stderr


@pytest.mark.slow
def test_unwritable_run_folder(tmp_path, recipe):
    blocked = tmp_path / "file"
    blocked.write_text("", encoding="utf-8")  # a file in the way: refused whoever runs the test, root too
    result = trainyard("train", str(recipe), f"run.dir={blocked / 'run'}")
    assert result.returncode == 2
    assert "run.dir" in result.stderr
    assert "Traceback" not in result.stdout + result.stderr


@pytest.mark.quick
def test_several_at_once(tmp_path, recipe):
    result = trainyard("train", str(recipe), "--nproc", "2", f"run.dir={tmp_path}", "parallel.tensr=2", "run.steps=0",
                       "parallel.zero_stage=2", "parallel.pipeline=2", "data.train=/nowhere")
    assert result.returncode == 2
    for part in ("parallel.tensr", "run.steps", "/nowhere"):
        assert part in result.stderr


@pytest.mark.slow
def test_divergence_is_an_error_that_names_the_step(tmp_path, recipe):
    result = trainyard("train", str(recipe), f"run.dir={tmp_path}", "optimizer.lr=1e30", "optimizer.clip_norm=0.0",
                       "schedule.warmup_steps=0")
    assert result.returncode == 70
    assert "step" in result.stderr
    assert "optimizer.lr" in result.stderr
    assert "Traceback" not in result.stdout + result.stderr
