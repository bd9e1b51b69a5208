"""How an attempt ended, by the notes of its ranks and not by the launcher's exit code, and what should follow."""

from dataclasses import dataclass, replace
from pathlib import Path

from common.errors import ExitCode
from launchers.run_folder.notes import first_failure
from launchers.run_folder.run_lock import is_held_by_another
from launchers.run_folder.status import Status, attempts_without_progress, read, suspect_nodes, write

MAX_ATTEMPTS_WITHOUT_PROGRESS = 3
NEVER_AGAIN = (ExitCode.DONE, ExitCode.USER, ExitCode.DOES_NOT_FIT, ExitCode.DATA)


@dataclass(frozen=True)
class Outcome:
    """``code`` is the one to report; ``rank`` and ``node`` tell who failed first, where that is known."""

    code: int
    reason: str
    rank: int | None = None
    node: str | None = None


@dataclass(frozen=True)
class Decision:
    """``action`` is end, requeue or hold; ``bad_nodes`` are kept out of the next attempt."""

    action: str
    why: str
    bad_nodes: tuple[str, ...] = ()


def outcome(folder: Path, token: str, began_unix_seconds: float, launcher_code: int) -> Outcome:
    """What became of the attempt that began at this time. ``launcher_code`` counts when no rank wrote how it ended."""
    failure = first_failure(folder, token, began_unix_seconds)
    if failure is not None:
        return Outcome(failure.exit_code, failure.reason, failure.rank, failure.node)
    status = read(folder)
    if status is not None and status.exit_code is not None and is_closed(status, token, began_unix_seconds):
        return Outcome(status.exit_code, status.reason, status.rank, status.node)
    code = launcher_code if launcher_code not in (0, ExitCode.REQUEUE) else int(ExitCode.INTERNAL)
    return Outcome(code, f"the launcher ended with {launcher_code}, and no rank wrote down why")


def is_closed(status: Status, token: str, began_unix_seconds: float) -> bool:
    """Whether rank 0 of this attempt has written how it ended."""
    return (status.exit_code is not None and status.updated_unix_seconds >= began_unix_seconds
            and status.token in (None, token))


def close(folder: Path, token: str, began_unix_seconds: float, result: Outcome) -> Status | None:
    """Completes status.json when rank 0 could not; None when the folder belongs to another run."""
    if is_held_by_another(folder, token):
        return None
    status = read(folder)
    if status is None:
        return write(folder, Status(reason=result.reason, exit_code=result.code, rank=result.rank, node=result.node))
    if status.started_unix_seconds < began_unix_seconds:
        # It ended before it began to train, so the checkpoint is that of the attempt before.
        entry = {name: value for name, value in vars(status).items() if name != "history"}
        status = replace(status, attempt=status.attempt + 1, history=(*status.history, entry),
                         started_unix_seconds=began_unix_seconds, first_step=status.checkpoint_step)
    return write(folder, replace(status, reason=result.reason, exit_code=result.code, rank=result.rank,
                                 node=result.node))


def decide(status: Status, may_requeue: bool) -> Decision:
    """What should follow the attempt in ``status``."""
    code, reason = status.exit_code, status.reason
    if code in NEVER_AGAIN:
        return Decision("end", f"exit code {code}: {reason}")
    if code == ExitCode.REQUEUE and reason.partition(",")[0] != "SIGUSR1":
        return Decision("end", f"stopped by {reason}")
    if not may_requeue:
        return Decision("end", f"exit code {code}, and this job is not to be requeued")
    bad_nodes = tuple(suspect_nodes(status))
    count = attempts_without_progress(status)
    if count >= MAX_ATTEMPTS_WITHOUT_PROGRESS:
        return Decision("hold", f"{count} attempts without a new checkpoint, the last one: {reason}", bad_nodes)
    return Decision("requeue", reason, bad_nodes)
