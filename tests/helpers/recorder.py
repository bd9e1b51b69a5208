"""A pytest plugin: runs the parity suite without its ranks and writes down every config that it would train.

    python -m pytest tests/parity -p tests.helpers.recorder --record FILE

`train_on` then trains nothing. It reads the config with its overrides as a rank would, writes one line of JSON to FILE,
and leaves metrics that look like a run, so that a test goes on to its next run. How the tests end means nothing.
"""

from __future__ import annotations

import json
from pathlib import Path

from common.errors import ConfigError
from pretrain.config.run_config import RunConfig, load_run
from pretrain.training.metrics import EVALUATIONS_FILE, METRICS_FILE
from tests.helpers import devices, ranks


def pytest_addoption(parser) -> None:
    parser.addoption("--record", type=Path, help="file that takes a line for each config that would be trained")


def pytest_configure(config) -> None:
    record = config.getoption("--record")

    def train_on(world_size: int, config_path: Path, overrides: list[str], **_) -> list[int]:
        try:
            run = load_run(config_path, overrides, world_size)
        except ConfigError:  # a test of a refusal
            return [2] * world_size
        with record.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"world_size": world_size, **run.model_dump(mode="json")}) + "\n")
        _leave_metrics(run)
        return [0] * world_size

    def run_ranks(*_, **__):
        raise NotTrained

    ranks.train_on, ranks.run_ranks = train_on, run_ranks
    devices.need = lambda number: None  # what needs devices is recorded all the same
    devices.train_on_devices = lambda *args: train_on(*args)[0]


class NotTrained(Exception):
    """Ends a test that asks ranks for something other than a training run."""


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
