"""A pytest plugin: runs the parity suite without ranks and writes down every config that it would train.

    python -m pytest tests/parity -p tests.helpers.recorder --record FILE

Tests that train ask for the fixture `trainer`, which is a `Recorder` then; tests that do not are left out. A recorder
reads the config with its overrides as a rank would, writes one line of JSON to FILE, and leaves metrics that look like
a run, so that a test goes on to its next run. How the tests end means nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from common.errors import ConfigError
from pretrain.config.run_config import RunConfig, load_run
from pretrain.training.metrics import EVALUATIONS_FILE, METRICS_FILE


def pytest_addoption(parser) -> None:
    parser.addoption("--record", type=Path, help="file that takes a line for each config that would be trained")


def pytest_collection_modifyitems(config, items) -> None:
    left_out = [item for item in items if "trainer" not in item.fixturenames]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if "trainer" in item.fixturenames]


class Recorder:
    """A trainer (helpers/runs.py) that trains nothing."""

    def __init__(self, record: Path):
        self.record = record

    def on_ranks(self, world_size: int, config_path: Path, overrides: Sequence[str]) -> list[int]:
        try:
            run = load_run(config_path, list(overrides), world_size)
        except ConfigError:  # a test of a refusal
            return [2] * world_size
        with self.record.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"world_size": world_size, **run.model_dump(mode="json")}) + "\n")
        _leave_metrics(run)
        return [0] * world_size

    def on_gpus(self, number: int, config_path: Path, overrides: Sequence[str]) -> int:
        """Recorded on a machine without GPUs too."""
        return self.on_ranks(number, config_path, overrides)[0]


def _leave_metrics(run: RunConfig) -> None:
    folder = Path(run.run.dir)
    folder.mkdir(parents=True, exist_ok=True)
    steps = run.run.steps
    with (folder / METRICS_FILE).open("w", encoding="utf-8") as file:
        for step in range(1, steps + 1):
            file.write(json.dumps({"step": step, "loss": 6 - 2 * step / steps, "grad_norm": 2.0}) + "\n")
    with (folder / EVALUATIONS_FILE).open("w", encoding="utf-8") as file:
        for step in (0, steps):
            file.write(json.dumps({"step": step, "heldout_loss": 5.0}) + "\n")
