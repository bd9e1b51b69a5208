"""One attempt at a run, as the world outside sees it: the lock of its folder, requests to stop, status.json."""

import time
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from parallel.rank_info import RankInfo
from parallel.rendezvous import highest
from pretrain.errors import ExitCode, NodeSuspected
from pretrain.hooks.signals import StopSignals, exit_code_of, forget_requests, request_name
from pretrain.run_lock import RunLock
from pretrain.status import Status, begin, note_failure, reason_of, write

WRITE_SECONDS = 10.0


class Attempt:
    """A context around everything a rank does. Rank 0 holds the lock and writes status.json; any rank notes a failure.

    Raises UserError on entry when another run writes the folder.
    """

    def __init__(self, folder: Path, info: RankInfo):
        self.folder, self.info = folder, info
        is_main = info.rank == 0
        self.signals = StopSignals(folder if is_main else None)
        self.last_step = 0
        self._lock = RunLock(folder, info) if is_main else None
        self._status: Status | None = None
        self._begun = False
        self._written_seconds = 0.0

    def __enter__(self) -> "Attempt":
        self.signals.install()
        if self._lock is not None:
            self._lock.acquire()
        return self

    def begin(self, step: int, checkpoint: Path | None) -> None:
        """All ranks have met, and go on after ``step`` from a checkpoint or from the start."""
        self._begun, self.last_step = True, step
        if self._lock is not None:
            forget_requests(self.folder)
            self._status = begin(self.folder, self.info, step, checkpoint)

    def step_done(self, step: int) -> int:
        """Notes a step; returns the request to stop on which all ranks agree, 0 for none. A collective."""
        self.last_step = step
        if self._status is not None and time.monotonic() - self._written_seconds > WRITE_SECONDS:
            self._write()
        return highest(self.signals.requested_number())

    def saved(self, path: Path, step: int) -> None:
        """A checkpoint was written and verified."""
        if self._status is not None:
            self._status = replace(self._status, last_checkpoint=path.name, checkpoint_step=step)
            self._write()

    def stopped(self, request: int) -> ExitCode:
        """The run was saved and stops for a request; returns the exit code."""
        code = exit_code_of(request)
        self._write(reason=request_name(request), exit_code=int(code))
        return code

    def done(self) -> ExitCode:
        """All steps are done; returns the exit code."""
        self._write(reason="done", exit_code=int(ExitCode.DONE))
        return ExitCode.DONE

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is not None and self._begun:
            reason, code = reason_of(error)
            suspect = error if isinstance(error, NodeSuspected) else None  # all ranks may tell of the same one
            note_failure(self.folder, self.info, self.last_step, code, reason, suspect)
            who = suspect or self.info
            self._write(reason=reason, exit_code=code, rank=who.rank, node=who.node)
        if self._lock is not None:
            self._lock.release()
        self.signals.restore()

    def _write(self, **changes: object) -> None:
        if self._status is not None:
            self._status = write(self.folder, replace(self._status, last_step=self.last_step, **changes))
            self._written_seconds = time.monotonic()
