"""The contract between the loop and a kind of training."""

from collections.abc import Mapping
from typing import Any, Protocol

from parallel.engine import Engine
from pretrain.training.metrics import Record

Engines = Mapping[str, Engine]


class Task(Protocol):
    """One kind of training. The loop owns stopping, saving and hooks; a task owns data, steps and evaluations.

    `engines` holds one or more engines by name, all on the same process groups: one of them is `run.MODEL`. Every
    method is called on every rank, in the same order.
    """

    def step(self, engines: Engines, step: int) -> Record:
        """One optimizer step, counted from 1; returns its line of metrics.jsonl."""
        ...

    def evaluate(self, engines: Engines, step: int) -> Record | None:
        """The line of evaluations.jsonl after `step`; None where the config names nothing to evaluate on."""
        ...

    def state(self, step: int) -> dict[str, Any]:
        """Fields of the checkpoint's manifest from which the task goes on after `step`."""
        ...

    def close(self) -> None:
        """End what the task started (loader processes)."""
        ...
