"""What became of an attempt, for those who restart runs: launchers lose exit codes, so the run folder holds them.

``status.json`` is written by rank 0, always whole (temporary name, then rename). A rank that fails notes it in a file
of its own, since rank 0 may be dead; whoever reads the status sees the first of these notes.
"""

import contextlib
import json
import os
import re
import signal
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from common.errors import ExitCode, NodeSuspected
from parallel.ranks.rank_info import RankInfo

STATUS_FILE = "status.json"
NOTES_FOLDER = Path("logs")
KEPT_ATTEMPTS = 50
MAX_BYTES = 1 << 20
RUNNING = "running"
LOST_CONNECTION = re.compile(r"(?i)connection (closed|reset|refused)|broken pipe|remote process exited")
EXPLAINED_CODES = (ExitCode.DONE, ExitCode.USER, ExitCode.DOES_NOT_FIT, ExitCode.DATA, ExitCode.STORAGE,
                   ExitCode.REQUEUE)
HANGS = "one of the ranks hangs"
# How much later than its peers a rank that was killed may be noted, on a busy machine.
CLOSE_SECONDS = 2.0


@dataclass(frozen=True)
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
    """Writes the status under its final name in one go; returns it with the time of writing."""
    status = replace(status, updated_unix_seconds=time.time())
    write_note(folder / STATUS_FILE, asdict(status))
    return status


def note_failure(folder: Path, info: RankInfo, step: int, exit_code: int, reason: str,
                 suspect: NodeSuspected | None = None) -> None:
    """Any rank: notes when it failed, and who did (itself, or a suspect). Silent when even that cannot be written."""
    who = suspect or info
    note = {"rank": who.rank, "node": who.node, "job_id": info.job_id, "last_step": step, "exit_code": int(exit_code),
            "reason": reason[:2000], "unix_seconds": time.time(), "token": info.attempt_token}
    with contextlib.suppress(OSError):
        write_note(folder / NOTES_FOLDER / f"failed-rank{info.rank}.json", note)


def forget_failures(folder: Path) -> None:
    """Removes the notes of an earlier attempt."""
    for note in _notes(folder):
        note.unlink(missing_ok=True)


def _notes(folder: Path) -> list[Path]:
    # A rank writes failed-*, with the reason; its wrapper (launchers/supervise/rank_wrapper.py) writes exit-*.
    return [path for kind in ("failed", "exit") for path in (folder / NOTES_FOLDER).glob(f"{kind}-rank*.json")]


def first_failure(folder: Path, token: str | None = None, since_unix_seconds: float = 0.0) -> dict[str, Any] | None:
    """The note of the rank that failed first in the present attempt, or None.

    Notes with another token, and older ones, are left out.

    Ranks that only lost the connection to it fail too, and launchers then end the rest; neither is the cause. When no
    other note is there, ``rank`` and ``node`` are None: those who failed first left no word.
    """
    ranks: dict[Any, dict[str, Any]] = {}
    for path in sorted(_notes(folder)):  # exit-* before failed-*, whose reason is the better one
        note = _read_object(path)
        if note and _is_note(note) and note["unix_seconds"] >= since_unix_seconds \
                and (token is None or note.get("token") in (None, token)):
            earlier = ranks.get(note.get("rank"), note)["unix_seconds"]
            ranks[note.get("rank")] = note | {"unix_seconds": min(earlier, note["unix_seconds"])}
    lost = [note for note in ranks.values() if _is_echo(str(note.get("reason")))]
    last_seconds = min((note["unix_seconds"] for note in lost), default=float("inf")) + CLOSE_SECONDS
    causes = [note for note in ranks.values() if note not in lost and note["exit_code"] != 128 + signal.SIGTERM
              and note["unix_seconds"] <= last_seconds]
    if not causes and lost:
        names = ", ".join(sorted(str(note.get("rank")) for note in lost)[:16])
        first = min(lost, key=_when)
        reason = "lost the connection to a rank or node that left no word"
        if HANGS in first["reason"]:
            reason = first["reason"]
        return first | {"rank": None, "node": None, "reason": f"ranks {names}: {reason}"}
    return min(causes or ranks.values(), key=_when, default=None)


def _is_echo(reason: str) -> bool:
    return HANGS in reason or LOST_CONNECTION.search(reason) is not None


def _is_note(note: dict[str, Any]) -> bool:
    return isinstance(note.get("unix_seconds"), int | float) and isinstance(note.get("exit_code"), int)


def _when(note: dict[str, Any]) -> float:
    return note["unix_seconds"]


def read(folder: Path) -> Status | None:
    """The status as it stands, completed by the first failure that a rank noted; None when there is none."""
    values = _read_object(folder / STATUS_FILE)
    if values is None:
        return None
    known = {name: values[name] for name in Status.__dataclass_fields__ if name in values}
    status = Status(**known)
    status = replace(status, nodes=tuple(status.nodes), history=tuple(status.history))
    failure = first_failure(folder, status.token)
    if failure is None or status.exit_code in (ExitCode.DONE, ExitCode.REQUEUE):
        return status
    return replace(status, exit_code=failure["exit_code"], reason=str(failure.get("reason", "failed")),
                   rank=failure.get("rank"), node=failure.get("node"),
                   last_step=max(status.last_step, int(failure.get("last_step") or 0)))


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

    What data, storage, the config or the numbers bring about (a UserError) is no node's fault.
    """
    failures: dict[str, int] = {}
    for attempt in (asdict(status), *status.history):
        node, code = attempt.get("node"), attempt.get("exit_code")
        explained = str(attempt.get("reason")).startswith("UserError") or code in EXPLAINED_CODES
        if isinstance(node, str) and code is not None and not explained:
            failures[node] = failures.get(node, 0) + (times if code == ExitCode.NODE else 1)
    return sorted(node for node, count in failures.items() if count >= times)


def reason_of(error: BaseException) -> tuple[str, int]:
    """One line and the exit code for an exception that ends a rank."""
    code = getattr(error, "exit_code", None)
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else ExitCode.INTERNAL
    text = re.sub(r"\s+", " ", str(error)).strip()
    return f"{type(error).__name__}: {text}"[:2000], int(ExitCode.INTERNAL if code is None else code)


def _ended_silently(status: Status) -> Status:
    return replace(status, reason="ended without a word (killed, or its node was lost)", exit_code=128 + 9)


def write_note(path: Path, values: dict[str, Any]) -> None:
    """Writes one JSON object under its final name in one go, readable by owner and group. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o640)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(values, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _read_object(path: Path) -> dict[str, Any] | None:
    try:
        if path.stat().st_size > MAX_BYTES:
            return None
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None
