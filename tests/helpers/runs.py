"""Training runs that parity tests compare, each made once a session through `trainyard train`, whichever test asks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import pytest

from pretrain.config.run_config import load_run
from pretrain.training.metrics import EVALUATIONS_FILE, METRICS_FILE, read_metrics
from tests.helpers import devices, ranks
from tests.helpers.recipes import recipe_of, write_recipe
from tests.helpers.shared import make_once

# The recipe's 24 steps are for the core of the layouts; elsewhere six show the same: two of warm-up, four behind it,
# all of them clipped. An optimizer state that is wrong shows in the second step.
SHORT_STEPS = 6
SHORT_CLIP_NORM = 0.5
SHORT = (f"run.steps={SHORT_STEPS}", "schedule.warmup_steps=2", f"optimizer.clip_norm={SHORT_CLIP_NORM}")
# Held-out losses before the first step and after the last; three samples are fewer micro-batches than DualPipeV runs.
EVALUATED = (f"log.evaluate_every={SHORT_STEPS}", "log.evaluate_samples=3")


class Case(NamedTuple):
    """Where a model is spread. `data` counts data ranks; of them `expert` share the experts of a layer."""

    tensor: int = 1
    context: int = 1
    pipeline: int = 1
    data: int = 1
    zero: int = 0
    expert: int = 1
    sequence: bool = False

    @property
    def overrides(self) -> tuple[str, ...]:
        return (f"parallel.tensor={self.tensor}", f"parallel.context={self.context}",
                f"parallel.pipeline={self.pipeline}", f"parallel.zero_stage={self.zero}",
                f"parallel.expert={self.expert}", f"parallel.sequence={str(self.sequence).lower()}")

    @property
    def ranks(self) -> int:
        return self.tensor * self.context * self.pipeline * self.data

    def __str__(self) -> str:
        degrees = f"tp{self.tensor}-pp{self.pipeline}-dp{self.data}"
        degrees += f"-cp{self.context}" if self.context > 1 else ""
        degrees += f"-ep{self.expert}" if self.expert > 1 else ""
        return f"{degrees}-zero{self.zero}-sp{self.sequence:d}"


ONE = Case()


class Run(NamedTuple):
    """What a run left: the record of each step, and the held-out losses in their order."""

    steps: list[dict]
    heldout: list[float]

    @property
    def losses(self) -> list[float]:
        return [record["loss"] for record in self.steps]

    @property
    def norms(self) -> list[float]:
        return [record["grad_norm"] for record in self.steps]


class Trainer(Protocol):
    """Trains on ranks or on GPUs; `helpers/recorder.py` has one that only writes configs down."""

    def on_ranks(self, world_size: int, config_path: Path, overrides: Sequence[str]) -> list[int]: ...
    def on_gpus(self, number: int, config_path: Path, overrides: Sequence[str]) -> int: ...


class RealTrainer:
    """Exit codes of `trainyard train`."""

    def on_ranks(self, world_size: int, config_path: Path, overrides: Sequence[str]) -> list[int]:
        return ranks.train_on(world_size, config_path, list(overrides))

    def on_gpus(self, number: int, config_path: Path, overrides: Sequence[str]) -> int:
        """Skips the test where there are fewer GPUs."""
        devices.need(number)
        return devices.train_on_devices(number, config_path, list(overrides))


class Runs:
    """`runs(family, ranks, overrides)`: the run with this config, trained by the first test that asks for it.

    Known runs lie in a folder of the session under a hash of the resolved config, so that all files of tests and all
    worker processes share them.
    """

    def __init__(self, trainer: Trainer, folder: Path, data_of: Callable[[str], Path]):
        self.trainer, self.folder, self.data_of = trainer, folder, data_of

    def __call__(self, family: str, num_ranks: int, overrides: Sequence[str] = ()) -> Run:
        recipe = make_once(self.folder / family, lambda folder: write_recipe(
            folder / "recipe.yaml", self.data_of(family), recipe_of(family))) / "recipe.yaml"
        resolved = load_run(recipe, list(overrides), num_ranks).model_dump(mode="json")
        del resolved["run"]["dir"]
        key = hashlib.sha256(json.dumps([num_ranks, resolved], sort_keys=True).encode()).hexdigest()[:16]

        def train(folder: Path) -> None:
            codes = self.trainer.on_ranks(num_ranks, recipe, [*overrides, f"run.dir={folder / 'run'}"])
            assert codes == [0] * num_ranks

        return read_run(make_once(self.folder / key, train) / "run")

    def on(self, case: Case, family: str = "gpt", overrides: Sequence[str] = ()) -> Run:
        """The run of a family spread as `case` says."""
        return self(family, case.ranks, [*case.overrides, *overrides])

    def reference(self, family: str = "gpt", overrides: Sequence[str] = ()) -> Run:
        """The run on one rank, without what may change nothing: the options of `parallel` among the overrides."""
        return self(family, 1, [option for option in overrides if not option.startswith("parallel.")])


def read_run(folder: Path) -> Run:
    """What lies in a run folder; its steps are those from the first to the last."""
    steps = read_metrics(folder / METRICS_FILE)
    assert [record["step"] for record in steps] == list(range(1, len(steps) + 1))
    return Run(steps, [record["heldout_loss"] for record in read_metrics(folder / EVALUATIONS_FILE)])


def check_same(found: Run, expected: Run, bound: float = 1e-5) -> None:
    """Every loss, also held out, within `bound` and every gradient norm within ten times that, relative."""
    assert len(found.steps) == len(expected.steps)
    assert found.losses == pytest.approx(expected.losses, rel=bound)
    assert found.norms == pytest.approx(expected.norms, rel=10 * bound)
    assert found.heldout == pytest.approx(expected.heldout, rel=bound)


def check_reference(run: Run, learnt: float, clip_norm: float = SHORT_CLIP_NORM) -> None:
    """The reference learned and was clipped; else equality with it would prove little."""
    assert run.losses[-1] < run.losses[0] - learnt, "the reference did not learn"
    assert any(norm > clip_norm for norm in run.norms), "clipping never acted"
