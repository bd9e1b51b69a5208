"""The moments of a run at which something else may act: the base class and its caller."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol


class RunView(Protocol):
    """What a hook may read of a run (`pretrain.training.run.Run`). Hooks change nothing of it."""

    config: Any
    layout: Any
    rank: int
    world_size: int
    folder: Path
    start_step: int  # last step done before this process; 0 for a new run
    device_name: str
    node: str  # name of this rank's node

    @property
    def engine(self) -> Any:
        """From on_start on."""

    @property
    def is_main(self) -> bool: ...

    @property
    def total_steps(self) -> int: ...

    @property
    def num_parameters(self) -> int:
        """Of the whole model, tied ones once."""

    @property
    def num_active_parameters(self) -> int:
        """Of them, those that one token meets; fewer only with experts."""

    @property
    def tokens_per_step(self) -> int:
        """Over the whole global batch; samples for a family without tokens."""


class Hook:
    """Base of all hooks: a no-op at every moment.

    main_only: call it on the main rank alone; a hook that takes part in collectives leaves this False.
    """

    main_only = False

    def on_start(self, run: RunView) -> None:
        """Before the first step, after a checkpoint was loaded."""

    def on_step_end(self, run: RunView, record: dict[str, Any]) -> None:
        """After every step. record: one line of metrics.jsonl."""

    def on_evaluation(self, run: RunView, record: dict[str, Any]) -> None:
        """After an evaluation. record: `step`, `tokens` or `samples`, `heldout_loss` and its terms."""

    def on_checkpoint(self, run: RunView, path: Path, step: int) -> None:
        """After a checkpoint was written and verified."""

    def on_end(self, run: RunView, reason: str) -> None:
        """At the end, however it came; also when on_start did not get this far. reason: `done`, or why it stopped."""


class Hooks(Hook):
    """Calls hooks in the order given; a failure at any moment but the end stops the run."""

    def __init__(self, hooks: Iterable[Hook]) -> None:
        self._hooks = tuple(hooks)

    def _here(self, run: RunView) -> tuple[Hook, ...]:
        return tuple(hook for hook in self._hooks if run.is_main or not hook.main_only)

    def on_start(self, run: RunView) -> None:
        for hook in self._here(run):
            hook.on_start(run)

    def on_step_end(self, run: RunView, record: dict[str, Any]) -> None:
        for hook in self._here(run):
            hook.on_step_end(run, record)

    def on_evaluation(self, run: RunView, record: dict[str, Any]) -> None:
        for hook in self._here(run):
            hook.on_evaluation(run, record)

    def on_checkpoint(self, run: RunView, path: Path, step: int) -> None:
        for hook in self._here(run):
            hook.on_checkpoint(run, path, step)

    def on_end(self, run: RunView, reason: str) -> None:
        """Every hook gets its end, so that files are closed; the first failure is raised after the last one."""
        failures: list[Exception] = []
        for hook in self._here(run):
            try:
                hook.on_end(run, reason)
            except Exception as failure:
                failures.append(failure)
        if failures:
            raise failures[0]
