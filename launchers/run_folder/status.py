"""What became of an attempt, for those who restart runs: launchers lose exit codes, so the run folder holds them.

``status.json`` is written by rank 0, always whole. A rank that fails notes it in a file of its own (notes.py), since
rank 0 may be dead; whoever reads the status sees the first of these notes.
"""

import re
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from common.errors import ExitCode
from common.files import writing
from launchers.run_folder.json_file import read_json, write_json
from launchers.run_folder.notes import MAX_REASON_CHARACTERS, first_failure, forget_failures
from parallel.ranks.rank_info import RankInfo

STATUS_FILE = "status.json"
KEPT_ATTEMPTS = 50
RUNNING = "running"
EXPLAINED_CODES = (ExitCode.DONE, ExitCode.USER, ExitCode.DOES_NOT_FIT, ExitCode.DATA, ExitCode.STORAGE,
                   ExitCode.REQUEUE)
# Errors that no node is to blame for and whose exit code does not say so, by the name at the start of a reason.
EXPLAINED_ERRORS = ("UserError", "NotFinite", "RendezvousError")


@dataclass(frozen=True, kw_only=True)
class Status:
    """One attempt. ``exit_code`` is None while it runs; ``rank`` and ``node`` tell who failed, if somebody did.

    ``last_step`` is the last step done, ``checkpoint_step`` the step of the last verified checkpoint (0: none), and
    ``save_seconds`` how long the last one took (0: not known).
    ``history`` holds the attempts before this one, oldest first, without their own history.
    """

    attempt: int = 1
    job_id: str | None = None
    nodes: tuple[str, ...] = ()
    reason: str = RUNNING
    exit_code: int | None = None
    rank: int | None = None
    node: str | None = None
    last_step: int = 0
    last_checkpoint: str | None = None
    checkpoint_step: int = 0
    first_step: int = 0
    started_unix_seconds: float = 0.0
    updated_unix_seconds: float = 0.0
    save_seconds: float = 0.0
    token: str | None = None
    history: tuple[dict[str, Any], ...] = field(default=())


def begin(folder: Path, info: RankInfo, step: int, checkpoint: Path | None) -> Status:
    """Rank 0: writes the status of a new attempt that goes on after ``step``; the one before it joins the history."""
    before = read(folder)
    history: tuple[dict[str, Any], ...] = ()
    attempt = 1
    if before is not None:
        entry = asdict(before if before.exit_code is not None else _ended_silently(before))
        history = (*before.history, {name: value for name, value in entry.items() if name != "history"})
        attempt = before.attempt + 1
    forget_failures(folder)
    status = Status(attempt=attempt, job_id=info.job_id, nodes=info.nodes, last_step=step, first_step=step,
                    last_checkpoint=checkpoint.name if checkpoint else None, checkpoint_step=step if checkpoint else 0,
                    save_seconds=before.save_seconds if before else 0.0, started_unix_seconds=time.time(),
                    token=info.attempt_token, history=history[-KEPT_ATTEMPTS:])
    return write(folder, status)


def write(folder: Path, status: Status) -> Status:
    """Writes the status whole; returns it with the time of writing. Raises UserError or StorageError."""
    status = replace(status, updated_unix_seconds=time.time())
    with writing(folder / STATUS_FILE):
        write_json(folder / STATUS_FILE, asdict(status))
    return status


def read(folder: Path) -> Status | None:
    """The status as it stands, completed by the first failure that a rank noted; None when there is none."""
    values = read_json(folder / STATUS_FILE)
    if values is None:
        return None
    known = {name: values[name] for name in Status.__dataclass_fields__ if name in values}
    status = Status(**known)
    status = replace(status, nodes=tuple(status.nodes), history=tuple(status.history))
    failure = first_failure(folder, status.token)
    if failure is None or status.exit_code in (ExitCode.DONE, ExitCode.REQUEUE):
        return status
    return replace(status, exit_code=failure.exit_code, reason=failure.reason, rank=failure.rank, node=failure.node,
                   last_step=max(status.last_step, failure.last_step))


def attempts_without_progress(status: Status) -> int:
    """How many of the latest attempts ended without a newer checkpoint than the one they began with."""
    count = 0
    for attempt in (asdict(status), *reversed(status.history)):
        if attempt.get("checkpoint_step", 0) > attempt.get("first_step", 0) or attempt.get("exit_code") == 0:
            break
        count += 1
    return count


def suspect_nodes(status: Status, times: int = 2) -> list[str]:
    """Nodes on which this many attempts failed, and those that an attempt named as bad (exit code 71).

    What data, storage, the config or the numbers bring about is no node's fault.
    """
    failures: dict[str, int] = {}
    for attempt in (asdict(status), *status.history):
        node, code = attempt.get("node"), attempt.get("exit_code")
        explained = str(attempt.get("reason")).startswith(EXPLAINED_ERRORS) or code in EXPLAINED_CODES
        if isinstance(node, str) and code is not None and not explained:
            failures[node] = failures.get(node, 0) + (times if code == ExitCode.NODE else 1)
    return sorted(node for node, count in failures.items() if count >= times)


def reason_of(error: BaseException) -> tuple[str, int]:
    """One line and the exit code for an exception that ends a rank."""
    code = getattr(error, "exit_code", None)
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else ExitCode.INTERNAL
    text = re.sub(r"\s+", " ", str(error)).strip()
    return f"{type(error).__name__}: {text}"[:MAX_REASON_CHARACTERS], int(ExitCode.INTERNAL if code is None else code)


def _ended_silently(status: Status) -> Status:
    return replace(status, reason="ended without a reason (killed, or its node was lost)", exit_code=128 + 9)
