"""The wrapper of one rank: starts it, opens its log, and notes how it ended.

Launchers lose exit codes (srun gives 143 for a rank that exited with 77), and a killed rank cannot write its own. This
small process writes it. It also notices that its launcher or the supervisor is gone: Slurm, for instance, does not see
that its step daemon was killed. Called by the launchers as
``python -m launchers.supervise.rank_wrapper RUN_FOLDER ARGUMENTS...``.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from common.errors import ExitCode, RankInfoError
from launchers.local.child_process import dying_with_parent
from launchers.local.rank_logs import open_log
from launchers.run_folder.notes import NOTES_FOLDER, note_exit
from parallel.ranks.rank_info import SUPERVISOR, process_environment, read_rank_info

QUIET_CODES = (ExitCode.DONE, ExitCode.REQUEUE)
PARENT_POLL_SECONDS = 1.0


def main(argv: Sequence[str]) -> int:
    """Runs ``python -m pretrain`` with the arguments after the folder; returns its exit code (128 + a signal).

    Exit code 75 (saved, to be continued) becomes 0 for the launcher, which would otherwise kill the other ranks while
    they leave (srun), or start them again (torchrun with restarts). status.json has the code.
    """
    above = Above()
    first, *arguments = _without_local_rank(argv)
    folder = Path(first)
    try:
        info = read_rank_info()
    except RankInfoError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    rank = info.rank if info else 0
    (folder / NOTES_FOLDER).mkdir(parents=True, exist_ok=True)
    # Rank 0 has the console of the launcher, every other rank its file.
    output = open_log(folder / NOTES_FOLDER, rank)[1] if rank > 0 else None
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    child = subprocess.Popen(
        [sys.executable, "-m", "pretrain", *arguments], env=process_environment(), stdout=output,
        stderr=None if output is None else subprocess.STDOUT,
        preexec_fn=dying_with_parent(),  # noqa: PLW1509 (this process has one thread)
    )
    for number in (signal.SIGTERM, signal.SIGUSR1):
        # A launcher may signal only its own child, which is this process. A rank may get it twice without harm.
        signal.signal(number, lambda number, _frame: child.send_signal(number))
    code = _wait(child, above)
    code = 128 - code if code < 0 else code
    if code not in QUIET_CODES:
        note_exit(folder, info, code, _reason(code))
    return ExitCode.DONE if code in QUIET_CODES else code


class Above:
    """The processes above: the launcher, and the supervisor where it runs on this machine (Linux)."""

    def __init__(self) -> None:
        self._launcher = os.getppid()
        self._supervisor = Path("/proc", process_environment().get(SUPERVISOR, "none"), "cmdline")
        self._sees_supervisor = self._is_there()

    def is_gone(self) -> bool:
        return os.getppid() != self._launcher or (self._sees_supervisor and not self._is_there())

    def _is_there(self) -> bool:
        try:
            return b"launchers.supervise.supervisor" in self._supervisor.read_bytes()
        except OSError:
            return False


def _wait(child: subprocess.Popen[bytes], above: Above) -> int:
    """The child's return code. When a process above dies first, the rank is asked to save and end with the others."""
    told = False
    while True:
        try:
            return child.wait(None if told else PARENT_POLL_SECONDS)
        except subprocess.TimeoutExpired:
            if above.is_gone():
                told = True
                child.send_signal(signal.SIGUSR1)


def _reason(code: int) -> str:
    if code <= 128:
        return f"exit code {code}"
    try:
        return f"ended by {signal.Signals(code - 128).name}"
    except ValueError:
        return f"ended by signal {code - 128}"


def _without_local_rank(words: Sequence[str]) -> list[str]:
    """Without the --local_rank=N that deepspeed adds; the environment says it too."""
    return [word for word in words if not word.startswith(("--local_rank=", "--local-rank="))]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
