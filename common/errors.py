"""The errors of this project: each is a message for a person with an exit code, and most name what to change."""

from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import NamedTuple

from common.wording import count


class ExitCode(IntEnum):
    """The process's exit codes; the contract with schedulers and with whoever restarts a run."""

    DONE = 0
    USER = 2  # the user must change something
    DOES_NOT_FIT = 3
    DATA = 65  # a dataset, a checkpoint or a folder of weights is damaged
    INTERNAL = 70
    NODE = 71  # a node is suspected
    STORAGE = 74
    REQUEUE = 75  # saved, and wants to go on
    INTERRUPTED = 130  # Ctrl-C, as a shell reports it


class Problem(NamedTuple):
    """One thing the user must change. `where` is a dotted config key, an option or a file."""

    where: str
    asked: str
    possible: str
    change: str


class Damage(Problem):
    """A problem of files that are damaged: nothing in the config or on the command line is wrong."""


class TrainyardError(Exception):
    """Base of every error of this project. The command line shows the message and returns `exit_code`.

    Args:
        message: what happened and what to change.
        exit_code: replaces the code of the class.

    Every kind can be pickled, so that it reaches the main process from a worker.
    """

    exit_code: ExitCode = ExitCode.INTERNAL

    def __init__(self, message: str, exit_code: int | None = None) -> None:
        super().__init__(message)
        if exit_code is not None:
            self.exit_code = ExitCode(exit_code)

    @property
    def message(self) -> str:
        return str(self)


class ConfigError(TrainyardError):
    """The config cannot be run. Carries every problem found, not only the first.

    The exit code is that of damaged data where every problem is a `Damage`, and else that of a mistake of the user.
    """

    def __init__(self, problems: Iterable[Problem], source: str = "config") -> None:
        self.problems = list(problems)
        self.source = source
        Exception.__init__(self, self.problems, source)
        is_damage = bool(self.problems) and all(isinstance(problem, Damage) for problem in self.problems)
        self.exit_code = ExitCode.DATA if is_damage else ExitCode.USER

    def __str__(self) -> str:
        return render(self.problems, self.source)


class UserError(TrainyardError):
    """The user must change something that is not in the config. The message says what, and how."""

    exit_code = ExitCode.USER


class RankInfoError(UserError):
    """The rank variables disagree, are half set or are not numbers; the message names them and says what to do."""


class DataError(TrainyardError):
    """Data that is damaged."""

    exit_code = ExitCode.DATA


class CheckpointError(TrainyardError):
    """A checkpoint that is damaged, or does not hold what is asked of it; the message names the file."""

    exit_code = ExitCode.DATA


class OtherFormatError(CheckpointError):
    """A whole checkpoint in a format that this version does not read; no older checkpoint may stand in for it."""

    exit_code = ExitCode.USER


class StorageError(TrainyardError):
    """A disk or a file system refuses what it should be able to do. What was written before is untouched."""

    exit_code = ExitCode.STORAGE


class NoRoom(StorageError):
    """The disk has no room for the optimizer state of this rank."""


class NodeSuspected(TrainyardError):
    """A node computes, stores or communicates wrongly. `rank` and `node` are None where several may be meant."""

    exit_code = ExitCode.NODE

    def __init__(self, message: str, rank: int | None = None, node: str | None = None) -> None:
        super().__init__(message)
        self.rank, self.node = rank, node


class RendezvousError(TrainyardError):
    """The ranks did not find each other; the message names host, address, who is missing, and what to do.

    Args:
        is_mistake: a person has to change something, and trying again would not help.
        node: the only node from which no rank came, which is then suspected; None when that is not clear.
    """

    def __init__(self, message: str, is_mistake: bool = False, node: str | None = None) -> None:
        super().__init__(message, ExitCode.NODE if node else ExitCode.USER if is_mistake else ExitCode.INTERNAL)
        self.is_mistake, self.node = is_mistake, node


class NotFinite(TrainyardError):
    """The norm of the gradient is NaN or infinite, so this step changes no weight."""


class ConversionError(TrainyardError):
    """transformers refuses an exported folder, or computes something else from it: a defect in the name map."""


def render(problems: Sequence[Problem], source: str) -> str:
    """The problems as a numbered list for a person, under a line that names their source."""
    lines = [f"{source}: {count(len(problems), 'problem')}"]
    for number, problem in enumerate(problems, 1):
        lines += [
            f"{number:3}. {problem.where}",
            f"       asked     {problem.asked}",
            f"       possible  {problem.possible}",
            f"       change    {problem.change}",
        ]
    return "\n".join(lines)
