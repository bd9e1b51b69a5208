"""One attempt at a run, as the world outside sees it: the lock of its folder, requests to stop, status.json."""

import os
import time
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TypedDict, Unpack

from common.errors import ExitCode, NodeSuspected
from launchers.run_folder.notes import HANGS, note_failure
from launchers.run_folder.run_lock import RunLock
from launchers.run_folder.status import Status, begin, read, reason_of, write
from launchers.run_folder.stop_requests import requested
from parallel.ranks.agreement import max_over_ranks
from parallel.ranks.rank_info import RankInfo
from pretrain.training.stop_signals import StopSignals, exit_code_of, request_name
from pretrain.training.stop_watchdog import StopWatchdog

WRITE_SECONDS = 10.0
# How long stopping may take: this, and twice the longest step and a save; UNKNOWN while those have not been measured.
GRACE_SECONDS, UNKNOWN_GRACE_SECONDS = 30.0, 600.0


class Ending(TypedDict, total=False):
    """What the end of an attempt changes of its `Status`."""

    reason: str
    exit_code: int
    rank: int | None
    node: str | None


class Attempt:
    """A context around everything a rank does. Rank 0 holds the lock and writes status.json; any rank notes a failure.

    Raises UserError on entry when another run writes the folder.
    """

    def __init__(self, folder: Path, info: RankInfo):
        self.folder, self.info = folder, info
        is_main = info.rank == 0
        self.signals = StopSignals(folder if is_main else None, info.attempt_token)
        self.last_step = 0
        self.is_too_late = False
        self._step_done_seconds = self._longest_step_seconds = self._save_seconds = 0.0
        self._grace = StopWatchdog(self._grace_seconds, self._asked_by_file if is_main else lambda: False,
                                      self._give_up)
        self._lock = RunLock(folder, info) if is_main else None
        self._status: Status | None = None
        self._begun = False
        self._written_seconds = 0.0

    def __enter__(self) -> "Attempt":
        self.signals.install()
        if self._lock is not None:
            self._lock.acquire()
        self._grace.start()
        return self

    def begin(self, step: int, checkpoint: Path | None) -> None:
        """All ranks have met, and go on after ``step`` from a checkpoint or from the start."""
        before = read(self.folder)
        self._save_seconds = before.save_seconds if before else 0.0
        self._begun, self.last_step, self._step_done_seconds = True, step, time.monotonic()
        if self._lock is not None:
            self._status = begin(self.folder, self.info, step, checkpoint)

    def step_done(self, step: int) -> int:
        """Notes a step; returns the request to stop on which all ranks agree, 0 for none. A collective."""
        self.last_step = step
        now = time.monotonic()
        self._longest_step_seconds = max(self._longest_step_seconds, now - self._step_done_seconds)
        self._step_done_seconds = now
        if self._status is not None and time.monotonic() - self._written_seconds > WRITE_SECONDS:
            self._write()
        return max_over_ranks(self.signals.requested_number())

    def no_time_to_save(self) -> bool:
        """Whether the job ends before a save would; the last checkpoint is then better than half a new one.

        A collective: the clock and the measured save of rank 0 decide.
        """
        end = self.info.end_unix_seconds if self.info.rank == 0 else None
        self.is_too_late = bool(max_over_ranks(int(end is not None and end - time.time() < self._save_seconds)))
        return self.is_too_late

    def saved(self, path: Path, step: int, seconds: float) -> None:
        """A checkpoint was written in this time."""
        self._save_seconds = seconds
        self._step_done_seconds = time.monotonic()
        if self._status is not None:
            self._status = replace(self._status, last_checkpoint=path.name, checkpoint_step=step, save_seconds=seconds)
            self._write()

    def stopped(self, request: int) -> ExitCode:
        """The run stops for a request; returns the exit code."""
        code = exit_code_of(request)
        late = ", and no time was left to save" if self.is_too_late else ""
        self._write(reason=request_name(request) + late, exit_code=int(code))
        return code

    def done(self) -> ExitCode:
        """All steps are done; returns the exit code."""
        self._write(reason="done", exit_code=int(ExitCode.DONE))
        return ExitCode.DONE

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        # Before the ranks have met another run may own the folder; a token then tells its notes from ours.
        if error is not None and (self._begun or self.info.attempt_token):
            reason, code = reason_of(error)
            suspect = error if isinstance(error, NodeSuspected) else None  # all ranks may tell of the same one
            note_failure(self.folder, self.info, self.last_step, code, reason=reason, suspect=suspect)
            who = suspect or self.info
            self._write(reason=reason, exit_code=code, rank=who.rank, node=who.node)
        if self._lock is not None:
            self._lock.release()
        self._grace.stop()
        self.signals.restore()

    def _grace_seconds(self) -> float | None:
        if not self._begun:
            return None
        if not (self._longest_step_seconds and self._save_seconds):
            return UNKNOWN_GRACE_SECONDS
        return GRACE_SECONDS + 2 * (self._longest_step_seconds + self._save_seconds)

    def _asked_by_file(self) -> bool:
        return requested(self.folder, self.info.attempt_token) is not None

    def _give_up(self, seconds: float) -> None:
        """In the thread of the grace period: the main thread is stuck, so only the process can end."""
        note_failure(self.folder, self.info, self.last_step, ExitCode.INTERNAL,
                     reason=f"was asked to stop {seconds:.0f} s ago, and the ranks have not come to one step: {HANGS}")
        os._exit(ExitCode.INTERNAL)

    def _write(self, **changes: Unpack[Ending]) -> None:
        if self._status is not None:
            self._status = write(self.folder, replace(self._status, last_step=self.last_step, **changes))
            self._written_seconds = time.monotonic()
