"""How each rank of an attempt failed: one file a rank, since launchers lose exit codes and rank 0 may be dead.

A rank writes failed-rank<N>.json with the reason. Its wrapper (launchers/supervise/rank_wrapper.py) writes
exit-rank<N>.json with the exit code, and the node check exit-rank-of-<node>.json.
"""

import contextlib
import re
import signal
import time
from collections.abc import Iterable
from dataclasses import KW_ONLY, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from common.errors import ExitCode, NodeSuspected
from common.wording import listed
from launchers.run_folder.json_file import read_json, write_json
from parallel.ranks.rank_info import RankInfo

NOTES_FOLDER = Path("logs")
MAX_REASON_CHARACTERS, MAX_RANKS_NAMED = 2000, 16
LOST_CONNECTION = re.compile(r"(?i)connection (closed|reset|refused)|broken pipe|remote process exited")
HANGS = "one of the ranks hangs"
# How much later than its peers a rank that was killed may be noted, on a busy machine.
CLOSE_SECONDS = 2.0


@dataclass(frozen=True)
class Note:
    """When and how a rank or a node failed. `rank` and `node` are None where it is not known which."""

    rank: int | None
    node: str | None
    exit_code: int
    reason: str
    _: KW_ONLY
    unix_seconds: float
    job_id: str | None = None
    token: str | None = None  # of the attempt
    last_step: int = 0

    @property
    def is_consequence(self) -> bool:
        """The rank only lost the connection to another one, or waited for one that hangs."""
        return HANGS in self.reason or LOST_CONNECTION.search(self.reason) is not None


def note_failure(folder: Path, info: RankInfo, step: int, exit_code: int, *, reason: str,
                 suspect: NodeSuspected | None = None) -> None:
    """Any rank: notes when it failed, and who did (itself, or a suspect). Silent when even that cannot be written."""
    who = suspect or info
    note = Note(who.rank, who.node, int(exit_code), reason[:MAX_REASON_CHARACTERS], unix_seconds=time.time(),
                job_id=info.job_id, token=info.attempt_token, last_step=step)
    with contextlib.suppress(OSError):
        write_json(folder / NOTES_FOLDER / f"failed-rank{info.rank}.json", asdict(note))


def note_exit(folder: Path, info: RankInfo | None, exit_code: int, reason: str) -> None:
    """The wrapper of a rank: notes its exit code. Raises OSError."""
    note = Note(info.rank if info else 0, info.node if info else "", exit_code, reason, unix_seconds=time.time(),
                job_id=info.job_id if info else None, token=info.attempt_token if info else None)
    write_json(folder / NOTES_FOLDER / f"exit-rank{note.rank}.json", asdict(note))


def note_of_node(info: RankInfo, node: str, reason: str) -> Note:
    """That a node cannot train, whatever its ranks."""
    return Note(None, node, int(ExitCode.NODE), reason, unix_seconds=time.time(), job_id=info.job_id,
                token=info.attempt_token)


def write_note_of_node(folder: Path, note: Note) -> None:
    """Names a node that cannot train, for `trainyard status` and for the next attempt. Raises OSError."""
    write_json(folder / NOTES_FOLDER / f"exit-rank-of-{note.node}.json", asdict(note))


def forget_failures(folder: Path) -> None:
    """Removes the notes of an earlier attempt."""
    for path in _paths(folder):
        path.unlink(missing_ok=True)


def first_failure(folder: Path, token: str | None = None, since_unix_seconds: float = 0.0) -> Note | None:
    """The note of the rank that failed first in the present attempt, or None.

    Ranks that only lost the connection to it fail too, and launchers then end the rest; neither is the cause. When no
    other note is there, ``rank`` and ``node`` are None: the ranks that failed first wrote nothing.

    Args:
        token: notes of another attempt are left out.
        since_unix_seconds: older notes are left out.
    """
    notes = _by_rank(folder, token, since_unix_seconds)
    consequences = [note for note in notes if note.is_consequence]
    causes = _causes(notes, consequences)
    if causes:
        return _earliest(causes)
    if consequences:
        return _of_unknown_rank(consequences)
    return _earliest(notes) if notes else None


def note_from(values: dict[str, Any]) -> Note | None:
    """A note from the values of its file; None when they are none."""
    known = {field.name: values[field.name] for field in fields(Note) if field.name in values}
    known = {"rank": None, "node": None, "reason": "failed"} | known
    if not isinstance(known.get("unix_seconds"), int | float) or not isinstance(known.get("exit_code"), int):
        return None
    return replace(Note(**known), reason=str(known["reason"]), last_step=int(known.get("last_step") or 0))


def _paths(folder: Path) -> list[Path]:
    return [path for kind in ("failed", "exit") for path in (folder / NOTES_FOLDER).glob(f"{kind}-rank*.json")]


def _by_rank(folder: Path, token: str | None, since_unix_seconds: float) -> list[Note]:
    """One note for each rank: the reason of its failed-* file, where there is one, and the earlier of its times."""
    ranks: dict[int | None, Note] = {}
    for path in sorted(_paths(folder)):  # exit-* before failed-*, whose reason is the better one
        note = note_from(read_json(path) or {})
        if note is None or note.unix_seconds < since_unix_seconds or (token and note.token not in (None, token)):
            continue
        earlier = ranks.get(note.rank, note).unix_seconds
        ranks[note.rank] = replace(note, unix_seconds=min(earlier, note.unix_seconds))
    return list(ranks.values())


def _causes(notes: Iterable[Note], consequences: Iterable[Note]) -> list[Note]:
    """The notes of ranks that failed by themselves, and not long after others had lost a connection."""
    last_seconds = min((note.unix_seconds for note in consequences), default=float("inf")) + CLOSE_SECONDS
    return [note for note in notes if not note.is_consequence and note.exit_code != 128 + signal.SIGTERM
            and note.unix_seconds <= last_seconds]


def _of_unknown_rank(consequences: list[Note]) -> Note:
    first = _earliest(consequences)
    ranks = listed(sorted(str(note.rank) for note in consequences)[:MAX_RANKS_NAMED])
    reason = first.reason if HANGS in first.reason else "lost the connection to a rank or node that wrote no reason"
    return replace(first, rank=None, node=None, reason=f"ranks {ranks}: {reason}")


def _earliest(notes: Iterable[Note]) -> Note:
    return min(notes, key=lambda note: note.unix_seconds)
