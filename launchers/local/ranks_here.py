"""Runs all ranks on this machine: starts them, passes signals on, ends them together, reports the first failure."""

import contextlib
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import BinaryIO

from common.errors import ExitCode
from common.files import writing
from launchers.local.child_process import loopback_listener, rank_environment, signal_group, start_rank
from launchers.local.rank_logs import failure_text, open_log
from parallel.ranks.rank_info import STORE_FD, process_environment

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
# All ranks meet a mistake of the user, a check that failed, or the request to stop at about the same time.
AGREED_CODES = (ExitCode.USER, ExitCode.DOES_NOT_FIT, ExitCode.DATA, ExitCode.NODE, ExitCode.STORAGE,
                ExitCode.REQUEUE)


@dataclass(frozen=True)
class Limits:
    """How long ranks may take once one of them has ended with a code other than 0."""

    agree_seconds: float = 5.0  # until the others are told, when the code is one that all ranks give
    stop_seconds: float = 8.0  # from SIGTERM to SIGKILL


@dataclass
class Rank:
    """One child and its log. ``log_start`` is where this attempt begins in the log, in bytes."""

    number: int
    process: subprocess.Popen[bytes]
    log: Path
    _: KW_ONLY
    log_file: BinaryIO
    log_start: int

    @property
    def exit_code(self) -> int | None:
        """The code as a shell gives it: 128 + the signal's number for a rank that a signal ended."""
        code = self.process.returncode
        return 128 - code if code is not None and code < 0 else code

    @property
    def failure_code(self) -> int:
        """The same of a rank that failed; 0 for one that runs or that ended well."""
        return self.exit_code or 0


@dataclass
class Received:
    """Signals that reached this process: those to pass on, and whether everything must end at once."""

    pending: list[int] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)
    at_once: bool = False

    def handle(self, number: int, _frame: object) -> None:
        """Signal handler: only notes the signal. A second SIGINT ends the ranks at once."""
        if number == signal.SIGINT and signal.SIGINT in self.seen:
            self.at_once = True
        elif number not in self.seen:
            self.seen.add(number)
            self.pending.append(number)


def run_local(argv: Sequence[str], nproc: int, log_dir: Path | None) -> int:
    """Runs ``python -m pretrain ARGV`` as ``nproc`` ranks here; returns the first failing rank's exit code, or 0.

    Rank 0 has the console; the output of the others goes to ``log_dir/rank-N.log``. Without ``log_dir`` the logs are
    kept only when a rank fails. No rank is left behind, also when this process is killed.
    """
    return run_ranks([sys.executable, "-m", "pretrain", *argv], nproc, log_dir)


def run_ranks(command: Sequence[str], nproc: int, log_dir: Path | None, limits: Limits = Limits()) -> int:
    """Runs any command as ``nproc`` ranks; see run_local. Raises ValueError for fewer than one rank."""
    if nproc < 1:
        raise ValueError(f"{nproc} ranks were asked for; at least 1 is needed")
    folder = log_dir if log_dir is not None else Path(tempfile.mkdtemp(prefix="trainyard-logs-"))
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    ranks: list[Rank] = []
    received, code = Received(), 1
    try:
        with _handlers(received):
            try:
                ranks = _start_all(command, nproc, folder, ranks)
                failed = _watch(ranks, received, limits)
            finally:
                _end_all(ranks)
        code = _report(ranks, failed, received, folder)
    finally:
        if log_dir is None and code == 0:
            shutil.rmtree(folder, ignore_errors=True)
    return code


@contextlib.contextmanager
def _handlers(received: Received) -> Iterator[None]:
    before = {number: signal.signal(number, received.handle) for number in FORWARDED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _start_all(command: Sequence[str], nproc: int, folder: Path, ranks: list[Rank]) -> list[Rank]:
    """Fills and returns ``ranks``, so that those already started can be ended when a later one does not start."""
    base = process_environment()
    with loopback_listener() as listener:
        port = listener.getsockname()[1]
        for number in range(nproc):
            environ = rank_environment(base, number, nproc, port)
            log, log_file, log_start = open_log(folder, number)
            output: BinaryIO | None = log_file
            pass_fds: tuple[int, ...] = ()
            if number == 0:
                # The console itself and no pipe to it, so that rank 0 can tell a terminal from a file.
                output, pass_fds = None, (listener.fileno(),)
                environ[STORE_FD] = str(listener.fileno())
            process = start_rank(command, environ, output, pass_fds)
            ranks.append(Rank(number, process, log, log_file=log_file, log_start=log_start))
    return ranks


def _watch(ranks: list[Rank], received: Received, limits: Limits) -> Rank | None:
    """Waits until all ranks have ended; returns the one that failed first, or None."""
    first_failed: Rank | None = None
    tell_at = kill_at = float("inf")
    with _Deaths(ranks) as deaths:
        while running := [rank for rank in ranks if rank.process.poll() is None]:
            while received.pending:
                _signal_all(running, _as_sent_on(received.pending.pop(0)))
            first_failed = first_failed or _first_failed(ranks)
            now = time.monotonic()
            if first_failed is not None and tell_at == float("inf"):
                tell_at = now + (limits.agree_seconds if first_failed.exit_code in AGREED_CODES else 0)
                kill_at = tell_at + limits.stop_seconds
            if received.at_once or now >= kill_at:
                _signal_all(running, signal.SIGKILL)
            elif tell_at <= now < kill_at and first_failed not in deaths.told:
                deaths.told.append(first_failed)
                _signal_all(running, signal.SIGTERM)
            deaths.wait()
    return first_failed or _first_failed(ranks)


class _Deaths:
    """Wakes up when a rank ends (where the kernel offers that) or after a moment, so that signals are looked at."""

    def __init__(self, ranks: list[Rank]):
        self.told: list[Rank | None] = []
        self._selector = selectors.DefaultSelector()
        self._descriptors = [os.pidfd_open(rank.process.pid) for rank in ranks if hasattr(os, "pidfd_open")]

    def __enter__(self) -> "_Deaths":
        for descriptor in self._descriptors:
            self._selector.register(descriptor, selectors.EVENT_READ)
        return self

    def wait(self) -> None:
        ready = self._selector.select(timeout=0.1 if self._descriptors else 0.02)
        for key, _ in ready:
            self._selector.unregister(key.fd)

    def __exit__(self, *_: object) -> None:
        self._selector.close()
        for descriptor in self._descriptors:
            os.close(descriptor)


def _first_failed(ranks: list[Rank]) -> Rank | None:
    """The rank that failed; of several seen together one that a signal ended, as its peers only lost a connection."""
    failed = [rank for rank in ranks if rank.failure_code]
    return min(failed, key=lambda rank: (rank.failure_code < 128, rank.number), default=None)


def _as_sent_on(number: int) -> int:
    return signal.SIGTERM if number == signal.SIGHUP else number


def _signal_all(ranks: Sequence[Rank], number: int) -> None:
    for rank in ranks:
        if number == signal.SIGKILL:
            signal_group(rank.process, number)
        elif rank.process.poll() is None:
            # Only the rank: its loader workers are not meant.
            rank.process.send_signal(number)


def _end_all(ranks: Sequence[Rank]) -> None:
    """Nothing is left: also not a worker of a rank that has ended."""
    _signal_all(ranks, signal.SIGKILL)
    for rank in ranks:
        rank.process.wait()
        rank.log_file.close()


def _report(ranks: Sequence[Rank], failed: Rank | None, received: Received, folder: Path) -> int:
    if received.at_once:
        _say("stopped at once by the second Ctrl-C; nothing was saved since the last checkpoint")
        return 128 + signal.SIGINT
    if failed is None:
        return 0
    code = failed.failure_code
    if code in (ExitCode.USER, ExitCode.NODE) and ranks[0].exit_code == code:
        pass  # rank 0 has said it on the console
    elif code == ExitCode.USER:
        _say(failure_text(failed.log, failed.log_start))
    elif code != ExitCode.REQUEUE:
        _say_failure(ranks, failed, folder)
    return code


def _say_failure(ranks: Sequence[Rank], failed: Rank, folder: Path) -> None:
    code = failed.failure_code
    how = f"was ended by {_signal_name(code - 128)}" if code > 128 else f"failed with exit code {code}"
    lines = [f"rank {failed.number} {how}; its log is {failed.log}"]
    text = failure_text(failed.log, failed.log_start)
    if failed.number > 0 and text:
        lines += [f"--- the end of rank {failed.number}'s log", text, "---"]
    if len(ranks) > 1:
        lines.append(f"the other {len(ranks) - 1} ranks were ended; their logs are in {folder}")
    _say("\n".join(lines))


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
