"""What a run says when it cannot go on: problems with a change, and the exit codes (a fact: no torch)."""

from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import NamedTuple


class ExitCode(IntEnum):
    """The process's exit codes; the contract with schedulers and with whoever restarts a run."""

    DONE = 0
    USER = 2  # the user must change something
    DOES_NOT_FIT = 3
    DATA = 65  # data damaged beyond the allowed fraction, or no checkpoint verifies
    INTERNAL = 70
    NODE = 71  # a node is suspected
    STORAGE = 74
    REQUEUE = 75  # saved, and wants to go on
    INTERRUPTED = 130  # Ctrl-C, as a shell reports it


class Problem(NamedTuple):
    """One thing the user must change. `where` is a dotted config key, or a file."""

    where: str
    asked: str
    possible: str
    change: str


class ConfigError(Exception):
    """The config cannot be run. Carries every problem found, not only the first."""

    exit_code = ExitCode.USER

    def __init__(self, problems: Iterable[Problem], source: str = "config"):
        self.problems = list(problems)
        self.source = source
        super().__init__(source, self.problems)

    def __str__(self) -> str:
        return render(self.problems, self.source)


class UserError(Exception):
    """The user must change something that is not in the config. The message says what, and how."""

    def __init__(self, message: str, exit_code: int = ExitCode.USER):
        self.exit_code = ExitCode(exit_code)
        super().__init__(message)


class NodeSuspected(UserError):
    """A node computes, stores or communicates wrongly. `rank` and `node` are None where several may be meant."""

    def __init__(self, message: str, rank: int | None, node: str | None):
        super().__init__(message, ExitCode.NODE)
        self.rank, self.node = rank, node


class DataError(Exception):
    """Data that is missing, damaged or does not fit what was asked. Pickles, so it crosses worker processes."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


def render(problems: Sequence[Problem], source: str) -> str:
    """The problems as a numbered list for a person, under a line that names their source."""
    lines = [f"{source}: {len(problems)} {'problem' if len(problems) == 1 else 'problems'}"]
    for number, problem in enumerate(problems, 1):
        lines += [
            f"{number:3}. {problem.where}",
            f"       asked     {problem.asked}",
            f"       possible  {problem.possible}",
            f"       change    {problem.change}",
        ]
    return "\n".join(lines)
