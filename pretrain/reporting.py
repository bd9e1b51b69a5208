"""The end of a process: an error becomes a message on standard error and an exit code."""

import sys
import traceback
from collections.abc import Callable

from common.errors import ExitCode, TrainyardError


def report(work: Callable[[], int]) -> int:
    """The exit code of `work`, or of the error that it raised, which is written to standard error."""
    try:
        return work()
    except TrainyardError as error:
        _complain(error.message)
        return error.exit_code
    except KeyboardInterrupt:
        _complain("interrupted")
        return ExitCode.INTERRUPTED
    except Exception:
        _complain(f"{traceback.format_exc()}\nThis is a defect of Trainyard or of a library under it.")
        return ExitCode.INTERNAL


def _complain(text: str) -> None:
    sys.stderr.write(f"{text}\n")
