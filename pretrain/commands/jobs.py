"""Jobs that were submitted: remembered in the run folder, asked about, waited for, cancelled. No verb of its own."""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from common.errors import ExitCode, UserError
from launchers.run_folder.status import read, write_note
from launchers.with_slurm import cancel_argv, state_argv

SUBMITTED_FILE = "submitted.json"
POLL_SECONDS = 2.0
OVER = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED",
        "TIMEOUT", "REVOKED")


def remember(folder: Path, launcher: str, job_ids: Sequence[str]) -> None:
    """Writes down which jobs belong to a run folder."""
    write_note(folder / SUBMITTED_FILE, {"launcher": launcher, "job_ids": list(job_ids), "unix_seconds": time.time()})


def job_ids_of(folder: Path) -> list[str]:
    """The jobs of a run folder: those submitted, else the one that its status names."""
    try:
        values = json.loads((folder / SUBMITTED_FILE).read_text(encoding="utf-8"))
        found = [str(job_id) for job_id in values["job_ids"]]
    except (OSError, ValueError, KeyError, TypeError):
        status = read(folder)
        found = [status.job_id] if status is not None and status.job_id else []
    return [job_id for job_id in found if _is_job_id(job_id)]


def states(job_id: str) -> list[dict[str, str]] | None:
    """State, reason, time left and nodes of a job and its array elements; None when Slurm cannot be asked."""
    try:
        done = subprocess.run(state_argv(job_id), capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode != 0:
        return [] if "Invalid job id" in done.stderr else None
    names = ("job", "state", "reason", "time_left", "nodes")
    return [dict(zip(names, line.split("|"), strict=False)) for line in done.stdout.splitlines() if line.strip()]


def cancel(job_id: str) -> None:
    """Cancels a job. Raises UserError with Slurm's own words."""
    try:
        done = subprocess.run(cancel_argv(job_id), capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        raise UserError("scancel is not on this machine: cancel from a login node of the cluster") from None
    if done.returncode != 0:
        raise UserError(f"{done.stderr.strip()}\nscancel {job_id} failed: `squeue --me` shows your jobs")


def wait(folders: Sequence[Path], job_ids: Sequence[str]) -> int:
    """Waits until none of the jobs is queued or runs, however often they are requeued.

    Returns the exit code of the run, of an array the first that is not 0.
    """
    while any(not _is_over(job_id) for job_id in job_ids):
        time.sleep(POLL_SECONDS)
    return next((code for code in map(_exit_code, folders) if code != 0), 0)


def _exit_code(folder: Path) -> int:
    status = read(folder)
    if status is None or status.exit_code is None:
        sys.stderr.write(f"the jobs are over, and {folder} does not say how; its logs may\n")
        return ExitCode.INTERNAL
    return status.exit_code


def _is_over(job_id: str) -> bool:
    found = states(job_id)
    if found is None:
        return False  # the controller is away for a moment
    held = [entry for entry in found if entry.get("state") == "PENDING" and "held" in entry.get("reason", "").lower()]
    return all(entry.get("state") in OVER or entry in held for entry in found)


def _is_job_id(text: str) -> bool:
    return all(part.isdigit() for part in text.split("_")) and text.isascii()
