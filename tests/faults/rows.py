"""The table: which rows of the fault matrix are run, with what is expected and how many trials."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.faults import damaged_data, hostile, launched, on_slurm, signals_local
from tests.faults.bench import Bench, Trial


@dataclass(frozen=True)
class Row:
    """One row. ``at_once`` trials run at the same time, where they mostly wait for a scheduler."""

    name: str
    fault: str
    expected: str
    trials: int
    run: Callable[[Bench, Trial], None]
    slurm: bool = False
    at_once: int = 1


ROWS = (
    Row("F1", "warning before the time limit", "saved 10 s before it, requeued, exact", 10,
        on_slurm.before_the_time_limit, slurm=True, at_once=3),
    Row("F2", "SIGTERM from scancel", "saved in the grace period, never partial", 10, on_slurm.cancelled, slurm=True,
        at_once=2),
    Row("F3", "signal to one rank", "all stop at one step", 20, signals_local.to_one_rank),
    Row("F4", "signal in a save, at start-up, twice, with a stuck rank", "ends in the grace period", 20,
        signals_local.at_a_bad_moment),
    Row("F5", "USR1 to every process of the step", "loader workers live on, exact", 5, on_slurm.to_every_process,
        slurm=True, at_once=2),
    Row("F6", "node lost, node down", "requeued on another, first step within 60 s, exact", 5, on_slurm.lost_node,
        slurm=True),
    Row("F7", "controller away for 10 s", "the run does not notice", 3, on_slurm.controller_away, slurm=True),
    Row("F8", "a rank ends with 77 under srun", "77 and the rank are reported", 5, on_slurm.exit_code_under_srun,
        slurm=True, at_once=2),
    Row("F8d", "a rank ends with 77 under deepspeed", "77 and the rank are reported", 5,
        launched.exit_code_under_deepspeed),
    Row("F9", "TERM, USR1, KILL to deepspeed, to its child, to the supervisor", "no orphan after 15 s, not 0", 9,
        launched.killed_launcher),
    Row("F10", "three failures without progress", "held, with the reason", 1, on_slurm.no_progress, slurm=True),
    Row("F11", "a chain of five short jobs", "one long run, never two at once", 2, on_slurm.chain, slurm=True),
    Row("F12", "second job on the run folder; stale lock", "refused; taken over", 2, on_slurm.second_writer,
        slurm=True),
    Row("F13", "the file STOP", "saved, not requeued", 1, on_slurm.kill_switch, slurm=True),
    Row("F14", "impossible requests, CRLF, no shebang", "code 2, nothing pending", len(on_slurm.F14),
        on_slurm.impossible_request, slurm=True),
    Row("F15", "taken ports, names without address, two jobs on a node", "next port; an error that names both",
        len(launched.F15), launched.meeting_places),
    Row("F16", "seven ways to start the same run", "the same losses to the bit", len(launched.F16),
        launched.every_launcher, slurm=True),
    Row("E8", "step daemon killed", "the supervisor ends the job, exact", 3, on_slurm.step_daemon_killed, slurm=True,
        at_once=3),
    Row("G2", "one bit of a shard flipped under an open dataset", "sample and shard named, never other data",
        len(damaged_data.FLIPS), damaged_data.flipped_bits),
    Row("J5", "40 hostile values, by launcher and field", "nothing runs", len(hostile.LAUNCHERS) * len(hostile.FIELDS),
        hostile.hostile_values),
    Row("J7", "secrets in the environment of a crash", "in no file", len(hostile.J7), hostile.secrets_stay_out,
        slurm=True),
    Row("J8", "open ports during a run", "loopback only", len(launched.J8), launched.open_ports, slurm=True),
    Row("X2", "a node cannot write the run folder", "named, kept out, the job goes on elsewhere", 1, on_slurm.bad_node,
        slurm=True),
    Row("X1", "elastic torchrun, a rank killed", "restarted by torchrun, exact", 1, launched.elastic_restart),
)


def run_one(bench: Bench, name: str, number: int, folder: Path) -> None:
    """One trial of a row with a seed of its own. Raises AssertionError that names the seed."""
    row = next(row for row in ROWS if row.name == name)
    seed = random.SystemRandom().randrange(10**9)
    try:
        row.run(bench, Trial(number, seed, folder))
    except AssertionError as error:
        raise AssertionError(f"row {name}, trial {number}, seed of the trial {seed}: {error}") from error
