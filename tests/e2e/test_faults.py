"""A sample of `make faults` (tests/faults): one trial of rows that need no Slurm; test_slurm.py has those that do."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from launchers.run_folder.status import Status, read, write
from pretrain.checkpoint.locate import checkpoints_at
from tests.faults.bench import Bench
from tests.faults.rows import run_one
from tests.helpers.ranks import run_ranks, train

pytestmark = pytest.mark.slow

# Row and the number of its trial, which chooses the case where a row has several.
SAMPLE = [("F3", 0), ("F4", 0), ("F4", 2), ("F9", 8), *(("F15", case) for case in range(4)), ("G2", 0),
          ("G2", 1), ("J8", 0), ("X1", 0)]


@pytest.fixture(scope="module")
def bench(recipe, tmp_path_factory) -> Bench:
    return Bench(recipe, tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize(("name", "number"), SAMPLE, ids=str)
def test_row(bench, tmp_path, name, number):
    run_one(bench, name, number, tmp_path / "trial")


def test_a_save_that_would_come_too_late_is_not_begun(recipe, tmp_path):
    """Ten seconds are left and a save takes a thousand: the run ends at once, with the checkpoint it has."""
    write(tmp_path, Status(exit_code=75, reason="SIGUSR1", save_seconds=1000.0))
    (tmp_path / "STOP.requeue").write_text("this attempt")
    overrides = [f"run.dir={tmp_path}", "run.steps=40", "checkpoint.every=0"]
    assert run_ranks(_train_until, 2, str(recipe), overrides) == [75, 75]
    status = read(tmp_path)
    assert status.reason == "SIGUSR1, and no time was left to save"
    assert (status.last_step, status.checkpoint_step) == (1, 0)
    assert checkpoints_at(tmp_path) == []


def _train_until(info, recipe, overrides):
    return train(replace(info, end_unix_seconds=time.time() + 10, attempt_token="this attempt"), recipe, overrides)
