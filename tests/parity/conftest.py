"""How parity tests train: through `trainer`, and most of them through `runs`, which trains a config once a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.recorder import Recorder
from tests.helpers.runs import RealTrainer, Runs, Trainer


@pytest.fixture(scope="session")
def trainer(pytestconfig) -> Trainer:
    """Real ranks; with `--record` nothing is trained and configs are written down (helpers/recorder.py)."""
    record = pytestconfig.getoption("record", default=None)
    return Recorder(record) if record else RealTrainer()


@pytest.fixture(scope="session")
def runs(trainer, shared_folder, request) -> Runs:
    def data_of(family: str) -> Path:
        return request.getfixturevalue("shapes" if family == "clip" else "dataset")

    return Runs(trainer, shared_folder / "runs", data_of)
