"""Rows F3 and F4: signals on one machine, to ranks of a warm server where a launcher is not part of the question."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

from launchers.run_folder.notes import HANGS, first_failure
from parallel.ranks.rank_info import RankInfo
from pretrain.training.metrics import read_metrics
from tests.faults.bench import RUN, Bench, Trial, check_end, check_goes_on, check_saved, ranks_of
from tests.helpers.ranks import run_ranks, train


def to_one_rank(bench: Bench, trial: Trial) -> None:
    """F3: one rank is told, and all stop at the same step."""
    rank, step = trial.random.randrange(2), trial.random.randrange(2, 150)
    trial.facts |= {"rank": rank, "step": step}
    _run(bench, trial, {"told": [rank], "step": step, "numbers": [signal.SIGUSR1]})
    check_saved(check_end(trial.run, bench.reference(2)), "SIGUSR1")


def during_a_save(bench: Bench, trial: Trial) -> None:
    """F4: every rank is told while a checkpoint is being written."""
    _run(bench, trial, {"told": [0, 1], "step": None, "numbers": [signal.SIGUSR1]})
    check_saved(check_end(trial.run, bench.reference(2)), "SIGUSR1")


def twice(bench: Bench, trial: Trial) -> None:
    """F4: the warning, and then the end, or the warning again."""
    second = trial.random.choice([signal.SIGUSR1, signal.SIGTERM])
    step = trial.random.randrange(2, 150)
    _run(bench, trial, {"told": [0, 1], "step": step, "numbers": [signal.SIGUSR1, second]})
    status = check_end(trial.run, bench.reference(2))
    check_saved(status, status.reason)
    assert status.reason in ("SIGUSR1", "SIGTERM"), status


def during_start_up(bench: Bench, trial: Trial) -> None:
    """F4: at any time of the start. Before its handlers the command ends at once, with nothing begun."""
    with bench.started(trial, bench.train_words(trial.run)) as started:
        seconds = trial.random.uniform(0.2, 12)
        trial.facts["after_seconds"] = round(seconds, 1)
        time.sleep(seconds)
        started.process.send_signal(signal.SIGUSR1)
        code = started.wait(240)
        assert code in (75, -signal.SIGUSR1), started.said
        if code == 75:
            check_saved(check_end(trial.run, bench.reference(2)), "SIGUSR1")


def with_a_stuck_rank(bench: Bench, trial: Trial) -> None:
    """F4: one rank does not answer any more. The others leave within the grace period, and nobody is left."""
    with bench.started(trial, bench.train_words(trial.run)) as started:
        started.wait_for_step(60)  # a checkpoint has been written, so the grace period is known
        os.kill(ranks_of(trial.run)[trial.random.randrange(2)], signal.SIGSTOP)
        at = time.monotonic()
        started.process.send_signal(signal.SIGUSR1)
        assert started.wait(150) == 70, started.said
        trial.facts["ended_after_seconds"] = round(time.monotonic() - at, 1)
        status = check_end(trial.run, bench.reference(2))
        assert HANGS in status.reason, status
        assert status.rank is None, status
    check_goes_on(bench, trial)


F4 = (during_a_save, during_start_up, twice, with_a_stuck_rank)


def at_a_bad_moment(bench: Bench, trial: Trial) -> None:
    """F4: four moments in turn."""
    case = F4[trial.number % len(F4)]
    trial.facts["case"] = case.__name__
    case(bench, trial)


def _run(bench: Bench, trial: Trial, plan: dict[str, Any]) -> None:
    overrides = [f"run.dir={trial.run}", *RUN]
    codes = run_ranks(_train_and_signal, 2, str(bench.recipe), overrides, str(trial.run), plan)
    assert codes == [75, 75], (codes, first_failure(trial.run))


def _train_and_signal(info: RankInfo, recipe: str, overrides: list[str], folder: str, plan: dict[str, Any]) -> int:
    """A rank that signals itself at a step, or (no step) in the middle of a save."""
    def watch() -> None:
        checkpoints = Path(folder) / "checkpoints"
        while plan["step"] is not None and len(read_metrics(Path(folder) / "metrics.jsonl")) < plan["step"]:
            time.sleep(0.005)
        while plan["step"] is None and not list(checkpoints.glob("*.part")):
            time.sleep(0.0005)
        for number in plan["numbers"]:
            os.kill(os.getpid(), number)
            time.sleep(0.02)

    said = os.open(Path(folder).with_name(f"said-{info.rank}"), os.O_WRONLY | os.O_CREAT, 0o640)
    for stream in (1, 2):
        os.dup2(said, stream)
    if info.rank in plan["told"]:
        threading.Thread(target=watch, daemon=True).start()
    return train(info, recipe, overrides)
