"""Slurm's programs: the only file that runs sbatch, squeue, scancel, scontrol and srun."""

import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from common.errors import UserError
from parallel.ranks.rank_info import process_environment

# States of a job that never runs again.
OVER = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED",
        "TIMEOUT", "REVOKED")
RUNNING = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED")
QUEUE_SECONDS, CONTROL_SECONDS = 60.0, 120.0
# Pauses before scontrol is asked again: the controller may be away for a moment.
RETRY_SECONDS = (2, 5, 15, 60, 0)
EXCLUDE_ATTEMPTS, EXCLUDE_PAUSE_SECONDS = 20, 0.2
# scontrol: asking again would not help, or Slurm has requeued the job already.
FINAL_ANSWERS = ("Invalid", "not permitted", "pending execution")


class QueueEntry(NamedTuple):
    """A job, or one element of an array, as squeue shows it."""

    job: str
    state: str
    reason: str = ""
    time_left: str = ""
    nodes: str = ""

    @property
    def is_over(self) -> bool:
        return self.state in OVER

    @property
    def is_held(self) -> bool:
        return self.state == "PENDING" and "held" in self.reason.lower()


def submit_script(script: Path, after: str | None = None) -> str:
    """Submits a batch script and returns the job's id. Raises UserError with Slurm's own words.

    after: the job after whose end, however it came, this one begins.
    """
    # SBATCH_* variables would win over the script that was shown and checked.
    environ = {name: text for name, text in process_environment().items() if not name.startswith("SBATCH_")}
    done = _run(submit_argv(script, after), environ=environ)
    if done.returncode != 0:
        raise UserError(f"{done.stderr.strip()}\nsbatch refused {script}; nothing was submitted"
                        + (f" after job {after}" if after else "")
                        + ": `sinfo` shows partitions, nodes and limits of this cluster")
    return done.stdout.strip().partition(";")[0]


def submit_argv(script: Path | str, after: str | None = None) -> list[str]:
    chain = [f"--dependency=afterany:{after}", "--kill-on-invalid-dep=yes"] if after else []
    return ["sbatch", "--parsable", *chain, str(script)]


def cancel(job_id: str) -> None:
    """Cancels a job. Raises UserError with Slurm's own words."""
    try:
        done = _run(["scancel", job_id], seconds=QUEUE_SECONDS)
    except FileNotFoundError:
        raise UserError("scancel is not on this machine: cancel from a login node of the cluster") from None
    if done.returncode != 0:
        raise UserError(f"{done.stderr.strip()}\nscancel {job_id} failed: `squeue --me` shows your jobs")


def queue_entries(job_id: str) -> list[QueueEntry] | None:
    """The entries of a job and its array elements; none when Slurm has forgotten it, None when it cannot be asked."""
    lines = _squeue(job_id, "--states=all", "--format", "%i|%T|%r|%L|%N")
    return None if lines is None else [QueueEntry(*line.split("|", 4)) for line in lines if "|" in line]


def has_ended(job_id: str) -> bool | None:
    """Whether no part of the job runs any more; None when Slurm cannot be asked."""
    states = _squeue(job_id, "--format", "%T") if is_job_id(job_id) else None
    return None if states is None else not any(state.strip() in RUNNING for state in states)


def is_job_id(text: str) -> bool:
    return all(part.isdigit() for part in text.split("_")) and text.isascii()


def requeue(job_id: str, hold: bool, say: Callable[[str], None]) -> None:
    """Asks Slurm to start the job again, or to hold it in the queue; `say` is given the answer to a failed attempt."""
    verb = "requeuehold" if hold else "requeue"
    for pause in RETRY_SECONDS:
        done = _run(["scontrol", verb, job_id], seconds=CONTROL_SECONDS)
        if done.returncode == 0:
            return
        if done.stderr.strip():  # empty where Slurm, which ends this job for the requeue, has ended scontrol too
            say(f"scontrol {verb}: {done.stderr.strip()}")
        if any(text in done.stderr for text in FINAL_ANSWERS):
            return
        time.sleep(pause)


def exclude_nodes(job_id: str, nodes: Sequence[str]) -> tuple[bool, str]:
    """Keeps nodes out of the next start of a pending job, beside those that were excluded before.

    Returns whether Slurm agreed, and all the excluded nodes. It takes this of a pending job only, so a job that is
    being requeued is tried for a few seconds.
    """
    done = _run(["squeue", "--noheader", "--jobs", job_id, "--format", "%x"], seconds=QUEUE_SECONDS)
    before = done.stdout.strip() if done.returncode == 0 else ""
    names = ",".join([*filter(None, [before]), *nodes])
    for _ in range(EXCLUDE_ATTEMPTS):
        update = ["scontrol", "update", f"JobId={job_id}", f"ExcNodeList={names}"]
        if _run(update, seconds=CONTROL_SECONDS).returncode == 0:
            return True, names
        time.sleep(EXCLUDE_PAUSE_SECONDS)
    return False, names


def run_on_every_node(num_nodes: int, module: Sequence[str], variables: Mapping[str, str]) -> tuple[int, str]:
    """Runs `python -m MODULE ...` as one task a node of this job; returns its exit code and what it printed."""
    command = ["srun", f"--nodes={num_nodes}", f"--ntasks={num_nodes}", "--ntasks-per-node=1", "--export=ALL",
               "--mpi=none", "--input=none", sys.executable, "-m", *module]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=False,
                          env=process_environment() | dict(variables))
    return done.returncode, done.stdout


def _squeue(job_id: str, *options: str) -> list[str] | None:
    """What squeue prints of a job; nothing when Slurm has forgotten it, None when it cannot be asked."""
    try:
        done = _run(["squeue", "--noheader", "--jobs", job_id, *options], seconds=QUEUE_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode != 0:
        return [] if "Invalid job id" in done.stderr else None
    return done.stdout.splitlines()


def _run(command: Sequence[str], environ: Mapping[str, str] | None = None, seconds: float | None = None
         ) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(command), capture_output=True, text=True, check=False, timeout=seconds,
                          env=None if environ is None else dict(environ))
