"""One writer for a run folder: a second job on it is refused; what a dead one left behind is taken over."""

import contextlib
import json
import os
import socket
import threading
import uuid
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import writing
from launchers.slurm_control import has_ended
from parallel.ranks.rank_info import RankInfo

LOCK_FILE = "run.lock"
HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 120.0
DEAD = "dead"


class RunLock:
    """Rank 0 holds it from before the first read of the run folder until the end of the run.

    The lock names job, host and process; its modification time is the heartbeat, renewed by a thread.
    """

    def __init__(self, folder: Path, info: RankInfo):
        self.path = Path(folder) / LOCK_FILE
        self._token = uuid.uuid4().hex
        self._own = {"token": self._token, "job_id": info.job_id, "host": socket.gethostname(),
                     "pid": os.getpid(), "process_start": _process_start(os.getpid()), "attempt": info.attempt,
                     "attempt_token": info.attempt_token}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> "RunLock":
        """Takes the lock.

        Raises UserError naming the job that writes the folder now, or StorageError when the storage fails.
        """
        for _ in range(5):
            with writing(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                created = self._create()
            if created:
                self._thread = threading.Thread(target=self._beat, name="run lock", daemon=True)
                self._thread.start()
                return self
            holder = _read(self.path)
            if holder is None:
                continue  # released in this moment
            if not self._is_gone(holder):
                raise UserError(self._refusal(holder))
            self._remove(str(holder.get("token")))
        raise UserError(f"{self.path} changes hands all the time: are several jobs started on this run folder?")

    def refusal(self) -> str | None:
        """Why the lock would be refused now; None when it is free, or left behind by a run that is gone."""
        holder = _read(self.path)
        return None if holder is None or self._is_gone(holder) else self._refusal(holder)

    def release(self) -> None:
        """Gives the lock back if it is still ours."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=5)
            self._remove(self._token)
            self._thread = None

    def __enter__(self) -> "RunLock":
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    def _create(self) -> bool:
        temporary = self.path.with_name(f".{LOCK_FILE}.{self._token}")
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o640)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(self._own, file)
            os.link(temporary, self.path)  # fails when the lock exists, on network file systems too
        except FileExistsError:
            return False
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def _remove(self, token: str) -> None:
        """Removes the lock with this token. Moved aside first: by now it may be somebody else's."""
        aside = self.path.with_name(f".{LOCK_FILE}.{uuid.uuid4().hex}.gone")
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.path, aside)
            if (_read(aside) or {}).get("token") != token:
                with contextlib.suppress(FileExistsError):
                    os.link(aside, self.path)
            aside.unlink(missing_ok=True)

    def _is_gone(self, holder: dict[str, Any]) -> bool:
        if holder.get("host") == self._own["host"] and _process_is_gone(holder):
            return True
        job_id = holder.get("job_id")
        if job_id and job_id == self._own["job_id"]:
            # Slurm runs a job only once at a time, so this is the attempt before a requeue.
            return holder.get("attempt") != self._own["attempt"]
        if job_id:
            ended = has_ended(str(job_id))
            if ended is not None:
                return ended
        return self._age_seconds() > STALE_SECONDS

    def _age_seconds(self) -> float:
        """Seconds since the last heartbeat, by the clock of the file system alone."""
        probe = self.path.with_name(f".{LOCK_FILE}.{uuid.uuid4().hex}.now")
        try:
            probe.touch()
            return probe.stat().st_mtime - self.path.stat().st_mtime
        except FileNotFoundError:
            return 0.0
        finally:
            probe.unlink(missing_ok=True)

    def _refusal(self, holder: dict[str, Any]) -> str:
        job = f"job {holder['job_id']}, " if holder.get("job_id") else ""
        return (f"{self.path.parent} is being written by another run ({job}process {holder.get('pid')} on "
                f"{holder.get('host')}, last sign of life {self._age_seconds():.0f} s ago): wait for it, cancel it, or "
                "choose another run.dir")

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(self.path)


def is_held_by_another(folder: Path, attempt_token: str) -> bool:
    """Whether the lock is there and of another attempt than the one with this token."""
    holder = _read(folder / LOCK_FILE)
    return holder is not None and holder.get("attempt_token") != attempt_token


def _read(path: Path) -> dict[str, Any] | None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _process_is_gone(holder: dict[str, Any]) -> bool:
    pid = holder.get("pid")
    if not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    start = _process_start(pid)
    # Another process may have the number by now, or it is dead and nobody has fetched its exit code.
    return start == DEAD or (start is not None and holder.get("process_start") not in (None, start))


def _process_start(pid: int) -> str | None:
    """When the process began, in ticks since boot (Linux); None elsewhere."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return None
    return DEAD if fields[0] == "Z" else fields[19]
