"""Writes metrics.jsonl (one object per step) and evaluations.jsonl (one per evaluation)."""

from typing import Any

from pretrain.training.hooks.hook import Hook, RunView
from pretrain.training.metrics import EVALUATIONS_FILE, METRICS_FILE, MetricsWriter


class MetricsFileHook(Hook):
    """Evaluations have a file of their own, because metrics.jsonl holds exactly one object per step."""

    main_only = True

    def __init__(self) -> None:
        self._writers: dict[str, MetricsWriter] = {}

    def on_start(self, run: RunView) -> None:
        self._writers[METRICS_FILE] = MetricsWriter(run.folder / METRICS_FILE, run.start_step)
        self._writers[EVALUATIONS_FILE] = MetricsWriter(run.folder / EVALUATIONS_FILE, run.start_step, first_step=0)

    def on_step_end(self, run: RunView, record: dict[str, Any]) -> None:
        self._writers[METRICS_FILE].write(record)

    def on_evaluation(self, run: RunView, record: dict[str, Any]) -> None:
        self._writers[EVALUATIONS_FILE].write(record)

    def on_end(self, run: RunView, reason: str) -> None:
        for writer in self._writers.values():
            writer.close()
