"""Requests to stop, from signals and from files. The handlers only set a flag; the loop looks at it after every step.

All ranks have to stop at the same step, so the loop reduces ``requested_number()`` (MAX) over the ranks every step.
"""

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from common.errors import ExitCode
from launchers.run_folder.stop_requests import STOP, STOP_AND_GO_ON, requested

# A scheduler's early warning and its polite end, and Ctrl-C.
Handler = Callable[[int, FrameType | None], Any] | int | None
REQUESTS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
_NUMBERS: dict[int, int] = {signal.SIGUSR1: 1, signal.SIGINT: 2, signal.SIGTERM: 3}
_FILES = {STOP: 4, STOP_AND_GO_ON: 1}
_NAMES = {number: signal.Signals(name).name for name, number in _NUMBERS.items()} | {_FILES[STOP]: STOP}


class StopSignals:
    """Notes SIGUSR1, SIGTERM and the first SIGINT; a second SIGINT ends the process at once with code 130."""

    def __init__(self, folder: Path | None = None, attempt_token: str | None = None) -> None:
        """folder: the run folder in which to look for a stop file, on one rank; None on the others."""
        self._folder, self._token = folder, attempt_token
        self._owner = os.getpid()
        self._noted: set[int] = set()  # adding is one step, which no handler can come between
        self._interrupts = 0
        self._before: dict[int, Handler] = {}

    def install(self) -> "StopSignals":
        """Takes the signals over (main thread only) and lets those in that the launcher held back until now."""
        if threading.current_thread() is threading.main_thread():
            for number in REQUESTS:
                self._before[number] = signal.signal(number, self._handle)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, REQUESTS)
        return self

    def restore(self) -> None:
        """Puts the handlers back that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def __enter__(self) -> "StopSignals":
        return self.install()

    def __exit__(self, *_: object) -> None:
        self.restore()

    @property
    def requested(self) -> bool:
        """True once a signal asked this rank to stop."""
        return any(self._noted)

    def requested_number(self) -> int:
        """0, or a number that the loop reduces with MAX over all ranks: STOP file > SIGTERM > SIGINT > SIGUSR1."""
        if self._folder is not None:
            self._noted.add(_FILES.get(requested(self._folder, self._token) or "", 0))
        return max(self._noted, default=0)

    def _handle(self, number: int, _frame: object) -> None:
        if os.getpid() != self._owner:
            # A loader worker inherits the handlers when it is forked. What is meant for ranks does not concern it.
            return
        self._noted.add(_NUMBERS[number])
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                os._exit(128 + signal.SIGINT)


def request_name(number: int) -> str:
    """Name of the request behind a reduced ``requested_number()``: SIGUSR1, SIGINT, SIGTERM, STOP or none."""
    return _NAMES.get(number, "none")


def exit_code_of(number: int) -> ExitCode:
    """Exit code of a run that has saved and stops for this request."""
    return ExitCode.DONE if request_name(number) == STOP else ExitCode.REQUEUE
