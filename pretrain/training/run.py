"""What is known of a run on one rank: its config and place, and how far it has come."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from parallel.engine import Engine
from parallel.layout import Layout
from pretrain.checkpoint.locate import CHECKPOINTS
from pretrain.config.run_config import RunConfig

MODEL = "model"  # the engine that hooks look at and checkpoints store


@dataclass(kw_only=True)
class Run:
    """What a task and hooks may read of a run.

    `engines` are filled in after the run folder has been looked at; all of them are on the same process groups.
    """

    config: RunConfig
    layout: Layout
    rank: int
    world_size: int
    folder: Path
    device_name: str
    node: str
    start_step: int = 0
    engines: Mapping[str, Engine] = field(default_factory=dict)

    @property
    def engine(self) -> Engine | None:
        """The engine of the model that the run is about."""
        return self.engines.get(MODEL)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def total_steps(self) -> int:
        return self.config.run.steps

    @property
    def num_parameters(self) -> int:
        return self.config.spec.parameter_count(self.config.model)

    @property
    def num_active_parameters(self) -> int:
        return self.num_parameters - self.config.spec.idle_parameter_count(self.config.model)

    @property
    def units_per_sample(self) -> int:
        return self.config.window_tokens if self.unit == "tokens" else 1

    @property
    def tokens_per_step(self) -> int:
        return self.config.parallel.global_batch * self.units_per_sample

    @property
    def unit(self) -> str:
        """What progress is counted in: tokens, or samples."""
        return self.config.spec.unit

    @property
    def checkpoints(self) -> Path:
        return self.folder / CHECKPOINTS


@dataclass
class RunProgress:
    """How far a run has come, and whether it was asked to stop; the same on every rank."""

    step: int
    adam_step: int  # optimizer updates, which are fewer than steps where fp16 overflowed
    total_steps: int
    request: int = 0  # the signal to stop that all ranks agreed on; 0 for none

    @property
    def is_last(self) -> bool:
        return self.step >= self.total_steps

    @property
    def is_interrupted(self) -> bool:
        """Whether a request stops the run before its last step."""
        return bool(self.request) and not self.is_last

    def advance(self, was_skipped: bool) -> None:
        """One more step is done."""
        self.step += 1
        self.adam_step += not was_skipped

    def is_evaluation_due(self, every: int) -> bool:
        """At the last step and every `every` steps, and at none on the way out."""
        return self.is_last or bool(every and self.step % every == 0 and not self.request)

    def is_checkpoint_due(self, every: int) -> bool:
        """On the way out; at the last step and every `every` steps unless `every` is 0."""
        return bool(self.request or (every and (self.is_last or self.step % every == 0)))
