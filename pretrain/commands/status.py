"""`trainyard status`: what became of a run, from its run folder and the queue."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from common.errors import ExitCode, UserError
from common.wording import duration, listed
from launchers.run_folder.status import Status, attempts_without_progress, read
from launchers.slurm_control import QueueEntry, queue_entries
from launchers.slurm_jobs import job_ids_of
from pretrain.config.config_file import read_config_file

TAIL_BYTES = 1 << 16
SPEEDS = ("tokens_per_second", "samples_per_second", "mfu")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("status", help="what became of a run", allow_abbrev=False,
                                   description="State of the job, step, loss, speed and time left.")
    parser.add_argument("target", metavar="RUN", help="run folder, or the config of the run")
    parser.add_argument("--json", action="store_true")


def run(args: argparse.Namespace) -> int:
    """Prints the state. Raises UserError when there is no such run."""
    report = report_of(folder_of(args.target))
    if args.json:
        sys.stdout.write(json.dumps(report, indent=1) + "\n")
        return ExitCode.DONE
    for name, value in report.items():
        if value not in (None, [], ""):
            shown = listed(value) if isinstance(value, list) else value
            sys.stdout.write(f"{name.replace('_', ' '):<18}{shown}\n")
    return ExitCode.DONE


def folder_of(text: str) -> Path:
    """The run folder that a person names directly or by its config."""
    path = Path(text)
    if path.is_file():
        from pretrain.config.run_config import load_config  # takes most of the time of this verb

        path = Path(load_config(path).run.dir)
    if not path.is_dir():
        raise UserError(f"{text}: there is no run folder {path}; give a run folder or the config of a run")
    return path


def report_of(folder: Path) -> dict[str, Any]:
    """Everything known about a run, as plain values by name."""
    status, record = read(folder), last_record(folder)
    report: dict[str, Any] = {"run": str(folder), "jobs": [_job_line(job_id) for job_id in job_ids_of(folder)]}
    report |= _of_attempt(status) if status else {}
    return report | (_of_progress(record, _total_steps(folder)) if record else {})


def _of_attempt(status: Status) -> dict[str, Any]:
    return {
        "state": status.reason, "exit_code": status.exit_code, "attempt": status.attempt,
        "without_progress": attempts_without_progress(status) if status.exit_code is not None else None,
        "failed_rank": status.rank, "failed_node": status.node, "nodes": list(status.nodes),
        "last_checkpoint": status.last_checkpoint,
    }


def _of_progress(record: dict[str, Any], steps: int | None) -> dict[str, Any]:
    found = {"step": record.get("step"), "of_steps": steps, "loss": record.get("loss")}
    found |= {name: round(record[name], 4) for name in SPEEDS if name in record}
    if steps and record.get("step_seconds"):
        found["time_left"] = duration((steps - record["step"]) * record["step_seconds"])
    return found


def last_record(folder: Path) -> dict[str, Any] | None:
    """The newest whole line of metrics.jsonl that belongs to a step."""
    try:
        with (folder / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "loss" in record:
            return record
    return None


def _total_steps(folder: Path) -> int | None:
    """`run.steps` of the config that the run has saved; read as plain values, which takes a fifth of the time."""
    section = read_config_file(folder / "config.yaml").values.get("run")
    steps = section.get("steps") if isinstance(section, dict) else None
    return steps if isinstance(steps, int) else None


def _job_line(job_id: str) -> str:
    entries = queue_entries(job_id)
    if entries is None:
        return f"{job_id} (the queue cannot be asked here)"
    return "; ".join(map(_entry_line, entries)) or f"{job_id} over"


def _entry_line(entry: QueueEntry) -> str:
    where = f"({entry.reason})" if entry.state == "PENDING" else f"on {entry.nodes}, {entry.time_left} left"
    return f"{entry.job} {entry.state} {where}"
