"""A rank starts without torch's compiler, which stays as it was for those who ask for it."""

import os
import sys

import pytest
import torch

from parallel.eager_imports import SWITCH, eager_imports
from tests.helpers.marks import slow_after
from tests.helpers.ranks import run_ranks, train
from tests.helpers.recipes import write_recipe


def train_and_look(info, recipe: str, overrides: list[str]) -> tuple[int, list[str]]:
    code = train(info, recipe, overrides)
    return code, [name for name in ("torch._inductor.lowering", "torch._inductor.compile_fx") if name in sys.modules]


@pytest.mark.parametrize("extra", slow_after(1, [
    ["parallel.zero_stage=3"], [], ["parallel.zero_stage=1", "model.experts=2"]]), ids=str)
def test_a_run_loads_no_compiler(extra, tmp_path, dataset):
    recipe = write_recipe(tmp_path / "gpt.yaml", dataset)
    overrides = [f"run.dir={tmp_path / 'run'}", "run.steps=1", *extra]
    assert run_ranks(train_and_look, 1, str(recipe), overrides) == [(0, [])]


def double(x):
    return 2 * x


@pytest.mark.parametrize("before", [None, "0"])
def test_the_switch_is_put_back(before, monkeypatch):
    monkeypatch.delenv(SWITCH, raising=False)
    if before is not None:
        monkeypatch.setenv(SWITCH, before)
    with eager_imports():
        assert torch.compile(double) is double
    assert os.environ.get(SWITCH) == before
    assert torch.compile(double) is not double
