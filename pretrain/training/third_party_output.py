"""Keeps the chatter of third parties away from the person: it goes to the log file of the rank.

DeepSpeed logs to standard output, compilers started by it inherit it, and torch and megatron-core warn on standard
error. The file descriptors themselves are therefore turned to the log, which also catches subprocesses and C++ code,
while our own words go to a copy of the real terminal. Known by logger names and descriptors alone: no third party is
imported here.
"""

import contextlib
import ctypes
import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from common.files import writing

OUR_LOGGERS = ("pretrain", "parallel", "data_pipeline", "launchers")
STANDARD_OUTPUT, STANDARD_ERROR = 1, 2

SHARED_MEMORY_OP, CPU_ADAM_OP = "deepspeed_shm_comm", "cpu_adam"
OPS = {  # what DeepSpeed compiles at its first start on a machine: the name in words, and how long it takes
    SHARED_MEMORY_OP: ("shared-memory op", "a minute"), CPU_ADAM_OP: ("Adam for the CPU", "two minutes"),
}  # fmt: skip


class ThirdPartyOutput:
    """What `third_party_output` yields.

    terminal: text stream to the real standard output. log_path: where the chatter goes.
    """

    def __init__(self, log_path: Path, is_main: bool) -> None:
        self.log_path = Path(log_path)
        with writing(self.log_path):
            self.log_path.parent.mkdir(parents=True, exist_ok=True)
            self._log = os.open(self.log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        _flush()
        self._saved = {descriptor: os.dup(descriptor) for descriptor in (STANDARD_OUTPUT, STANDARD_ERROR)}
        self.terminal = _text_stream(os.dup(STANDARD_OUTPUT))
        self._errors = _text_stream(os.dup(STANDARD_ERROR))
        self._show: Callable[[str], None] = self._write_error
        self._routing = _LogRouting(self.log_path, self._on_warning if is_main else None)
        self._previous_hook, threading.excepthook = threading.excepthook, self._report_thread
        for descriptor in self._saved:
            os.dup2(self._log, descriptor)

    def show_through(self, show: Callable[[str], None] | None) -> None:
        """Let our warnings reach the person through `show` (a console with a live line); None: standard error."""
        self._show = show or self._write_error

    def release(self) -> None:
        """Give standard output and error back, for after start-up; loggers and warnings still go to the log file."""
        if not self._saved:
            return
        _flush()
        for descriptor, saved in self._saved.items():
            os.dup2(saved, descriptor)
            os.close(saved)
        self._saved = {}
        self._routing.take_over()

    def close(self) -> None:
        """Undo everything."""
        self.release()
        self._routing.undo()
        threading.excepthook = self._previous_hook
        self._show = self._write_error
        self.terminal.close()
        self._errors.close()
        os.close(self._log)

    def _on_warning(self, record: logging.LogRecord) -> None:
        self._show(f"{record.levelname.lower()}: {record.getMessage()}")

    def _write_error(self, text: str) -> None:
        with contextlib.suppress(OSError):  # a terminal that went away must not end a run
            self._errors.write(text + "\n")

    def _report_thread(self, failure: threading.ExceptHookArgs) -> None:
        """An exception in a thread is ours until shown otherwise, so it goes to the real standard error."""
        lines = traceback.format_exception(failure.exc_type, failure.exc_value, failure.exc_traceback)
        self._show("exception in a thread\n" + "".join(lines).rstrip())


@contextlib.contextmanager
def third_party_output(log_path: Path, is_main: bool = True) -> Iterator[ThirdPartyOutput]:
    """Send what third parties write to `log_path` (logs/rank-N.log), for the length of the block.

    is_main: whether warnings of our own loggers are shown to the person; the log file has them on every rank.
    An exception that leaves the block finds standard error back in place, so it is printed where people look.
    Call `release()` on the result to end the redirection of descriptors early and keep the loggers quiet.
    Raises OSError where the log file cannot be made.
    """
    quiet = ThirdPartyOutput(log_path, is_main)
    try:
        yield quiet
    finally:
        quiet.close()


def compile_notice(extensions_dir: str | None, op: str) -> str | None:
    """What to tell the person before DeepSpeed's first start with an op (of OPS); None when it is built already.

    extensions_dir: value of TORCH_EXTENSIONS_DIR, None where it is not set (torch's own place is looked at then).
    """
    words, duration = OPS[op]
    folder = _extensions_root(extensions_dir) / op
    lock = folder / "lock"
    if lock.exists():
        return (
            f"waiting for another process that compiles DeepSpeed's {words}; "
            f"if none does (an earlier one was killed), delete {lock}"
        )
    return None if (folder / f"{op}.so").exists() else f"compiling DeepSpeed's {words}, once per machine, " \
                                                       f"about {duration}"


def _extensions_root(extensions_dir: str | None) -> Path:
    """The folder under which torch builds extensions for this interpreter and this build of torch."""
    if extensions_dir is not None:
        return Path(extensions_dir)
    # Imported here: torch takes a second, and every other part of this file does without it.
    import torch
    from torch.utils.cpp_extension import get_default_build_root

    if torch.version.hip:
        accelerator = "rocm" + torch.version.hip.replace(".", "")
    elif torch.version.cuda:
        accelerator = "cu" + torch.version.cuda.replace(".", "")
    else:
        accelerator = "cpu"
    python = f"py{sys.version_info.major}{sys.version_info.minor}{sys.abiflags}"
    return Path(get_default_build_root()) / f"{python}_{accelerator}"


class _Callback(logging.Handler):
    """Hands warnings and worse to a function."""

    def __init__(self, handle_record: Callable[[logging.LogRecord], None]) -> None:
        super().__init__(logging.WARNING)
        self._handle_record = handle_record

    def emit(self, record: logging.LogRecord) -> None:
        self._handle_record(record)


class _LogRouting:
    """Sends logging records to one file: ours from the beginning, third parties' once `take_over` is called.

    While the descriptors are turned to the file anyway, routing third parties too would write their lines twice.
    """

    def __init__(self, log_path: Path, on_warning: Callable[[logging.LogRecord], None] | None) -> None:
        self._file = logging.FileHandler(log_path, encoding="utf-8")
        self._file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self._saved: dict[logging.Logger, tuple[list[logging.Handler], bool, int]] = {}
        self._captures_warnings = False
        own: list[logging.Handler] = [self._file] if on_warning is None else [self._file, _Callback(on_warning)]
        for name in OUR_LOGGERS:
            our_logger = logging.getLogger(name)
            self._save(our_logger)
            our_logger.handlers = own.copy()
            our_logger.propagate = False
            our_logger.setLevel(logging.INFO)

    def take_over(self) -> None:
        """Turn every third-party logger that writes to a stream, the root logger and `warnings` to the file."""
        for name, third_party in list(logging.root.manager.loggerDict.items()):
            if isinstance(third_party, logging.Logger) and name.split(".")[0] not in OUR_LOGGERS:
                streams = [handler for handler in third_party.handlers if type(handler) is logging.StreamHandler]
                if streams:
                    self._save(third_party)
                    kept = [handler for handler in third_party.handlers if handler not in streams]
                    third_party.handlers = [*kept, self._file]
                    third_party.propagate = False
        self._save(logging.root)
        logging.root.handlers = [
            *(handler for handler in logging.root.handlers if type(handler) is not logging.StreamHandler),
            self._file,
        ]
        logging.captureWarnings(True)
        self._captures_warnings = True

    def undo(self) -> None:
        if self._captures_warnings:
            logging.captureWarnings(False)
        for saved_logger, (handlers, propagate, level) in self._saved.items():
            saved_logger.handlers, saved_logger.propagate = handlers, propagate
            saved_logger.setLevel(level)
        self._file.close()

    def _save(self, saved_logger: logging.Logger) -> None:
        self._saved[saved_logger] = (saved_logger.handlers.copy(), saved_logger.propagate, saved_logger.level)


def _text_stream(descriptor: int) -> TextIO:
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return open(descriptor, "w", buffering=1, encoding=encoding, errors="replace")


def _flush() -> None:
    """Empty Python's and C's buffers, so that what was written goes where it was meant to go."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).fflush(None)
