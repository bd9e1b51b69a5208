"""The Slurm jobs of a run folder: remembered in it, waited for."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from common.errors import ExitCode
from common.files import writing
from launchers.run_folder.json_file import read_json, write_json
from launchers.run_folder.status import read
from launchers.slurm_control import is_job_id, queue_entries

SUBMITTED_FILE = "submitted.json"
POLL_SECONDS = 2.0


def remember(folder: Path, job_ids: Sequence[str]) -> None:
    """Writes down which jobs belong to a run folder. Raises UserError or StorageError."""
    with writing(folder / SUBMITTED_FILE):
        write_json(folder / SUBMITTED_FILE, {"job_ids": list(job_ids), "unix_seconds": time.time()})


def job_ids_of(folder: Path) -> list[str]:
    """The jobs of a run folder: those submitted, else the one that its status names."""
    values = read_json(folder / SUBMITTED_FILE) or {}
    found = values.get("job_ids")
    if not isinstance(found, list):
        status = read(folder)
        found = [status.job_id] if status is not None and status.job_id else []
    return [str(job_id) for job_id in found if is_job_id(str(job_id))]


def wait(folders: Sequence[Path], job_ids: Sequence[str]) -> int:
    """Waits until none of the jobs is queued or runs, however often they are requeued.

    Returns the exit code of the run, of an array the first that is not 0.
    """
    while not all(_is_over(job_id) for job_id in job_ids):
        time.sleep(POLL_SECONDS)
    return next((code for code in map(_exit_code, folders) if code != 0), 0)


def _exit_code(folder: Path) -> int:
    status = read(folder)
    if status is None or status.exit_code is None:
        sys.stderr.write(f"the jobs are over, and {folder} does not say how; its logs may\n")
        return ExitCode.INTERNAL
    return status.exit_code


def _is_over(job_id: str) -> bool:
    entries = queue_entries(job_id)
    if entries is None:
        return False  # the controller is away for a moment
    return all(entry.is_over or entry.is_held for entry in entries)
