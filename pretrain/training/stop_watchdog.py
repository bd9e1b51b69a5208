"""A limit on stopping: when ranks were asked to stop and one of them hangs, the others do not wait for it for ever."""

import os
import select
import signal
import threading
import time
from collections.abc import Callable

from pretrain.training.stop_signals import REQUESTS

POLL_SECONDS = 1.0


class StopWatchdog:
    """Watches for a request to stop, in a thread, and gives up when it is not met in time.

    Python runs signal handlers between two steps of the main thread, so a rank that waits for a peer inside a
    collective never learns of the signal. The interpreter's wakeup pipe does.
    """

    def __init__(self, limit_seconds: Callable[[], float | None], asked: Callable[[], bool],
                 give_up: Callable[[float], None]):
        """
        Args:
            limit_seconds: how long stopping may take at present; None for no limit, which starts the time anew.
            asked: whether something else than a signal asks to stop.
            give_up: called in the thread, with the limit in seconds.
        """
        self._limit_seconds, self._asked, self._give_up = limit_seconds, asked, give_up
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._before = -1

    def start(self) -> None:
        """Begins to watch. Does nothing outside the main thread, where signals cannot be had."""
        if threading.current_thread() is not threading.main_thread():
            return
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="grace", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        if self._thread is None:
            return
        self._ended.set()
        signal.set_wakeup_fd(self._before)
        os.close(self._writer)
        self._thread.join(timeout=2 * POLL_SECONDS)
        os.close(self._reader)
        self._thread = None

    def _watch(self) -> None:
        asked_seconds: float | None = None
        while not self._ended.is_set():
            if asked_seconds is None and (self._signal_came() or self._asked()):
                asked_seconds = time.monotonic()
            elif asked_seconds is not None:
                limit = self._limit_seconds()
                if limit is None:
                    asked_seconds = time.monotonic()
                elif time.monotonic() - asked_seconds > limit:
                    self._give_up(limit)
                    return
                self._ended.wait(POLL_SECONDS)

    def _signal_came(self) -> bool:
        ready, _, _ = select.select([self._reader], [], [], POLL_SECONDS)
        return bool(ready) and any(number in REQUESTS for number in os.read(self._reader, 256))
