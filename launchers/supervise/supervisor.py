"""Runs a launcher (srun, deepspeed, torchrun, mpirun) for one attempt, and makes sure how it ends.

Launchers lose exit codes, die and leave ranks behind, or wait for ranks that are gone. This process, their parent,
passes on requests to save, kills remaining ranks, completes status.json, returns the exit code of the first rank that
failed, and under Slurm asks for the next attempt.
``python -m launchers.supervise.supervisor RUN_FOLDER [options] -- COMMAND...``
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path

from common.errors import ExitCode
from launchers import slurm_control
from launchers.local.child_process import dying_with_parent
from launchers.local.rank_logs import failure_text
from launchers.run_folder.notes import NOTES_FOLDER, first_failure, note_from, write_note_of_node
from launchers.run_folder.status import Status, read
from launchers.run_folder.stop_requests import ask_to_go_on_later, forget
from launchers.supervise.descendants import adopt_orphans, end_descendants
from launchers.supervise.outcome import Outcome, close, decide, is_closed, outcome
from parallel.ranks.rank_info import ATTEMPT, SUPERVISOR, process_environment

POLL_SECONDS = 0.2
# A launcher that goes on after a rank has failed, or after all ranks are done, is ended after this time.
FAILED_SECONDS, DONE_SECONDS, POLITE_SECONDS = 15.0, 90.0, 8.0
# The same for a launcher that starts failed ranks again: until they have met and forgotten the failure.
RESTART_SECONDS = 900.0


@dataclass
class Supervisor:
    """One attempt. ``by_signal``: signals go to srun, which passes them on; else ranks are asked through a file.

    ``restarts``: the launcher itself starts failed ranks again. ``asked``: a request to stop from before the launcher.
    """

    folder: Path
    command: Sequence[str]
    _: KW_ONLY
    by_signal: bool
    token: str
    restarts: bool = False
    began_unix_seconds: float = field(default_factory=time.time)
    process: subprocess.Popen[bytes] | None = None
    interrupts: int = 0
    asked: str | None = None
    cancelled: bool = False

    def listen(self) -> None:
        """From now on signals are requests."""
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def run(self) -> Outcome:
        """Runs the command to its end, and everything below it too."""
        if self.asked:
            return Outcome(int(ExitCode.REQUEUE), self.asked)
        adopt_orphans()
        # A session of its own: what a terminal or scheduler sends to our group is passed on by us, once.
        process = self.process = subprocess.Popen(
            list(self.command), stdin=subprocess.DEVNULL, start_new_session=True,
            env=process_environment() | {ATTEMPT: self.token, SUPERVISOR: str(os.getpid())},
            preexec_fn=dying_with_parent(held_back=()),  # noqa: PLW1509 (this process has one thread)
        )
        if self.asked:  # while the launcher was being started
            self._on_signal(signal.Signals[self.asked], None)
        self._wait(process)
        if process.returncode is None or not self.by_signal:
            end_descendants(POLITE_SECONDS if self.interrupts < 2 else 0)
        code = process.wait()
        forget(self.folder, self.token)
        return outcome(self.folder, self.token, self.began_unix_seconds, 128 - code if code < 0 else code)

    def _wait(self, process: subprocess.Popen[bytes]) -> None:
        give_up = float("inf")
        while process.poll() is None and self.interrupts < 2:
            patience = self._patience_seconds()
            give_up = float("inf") if patience is None else min(give_up, time.monotonic() + patience)
            if time.monotonic() > give_up:
                _say("the launcher does not end though its ranks have: ending it")
                return
            time.sleep(POLL_SECONDS)

    def _patience_seconds(self) -> float | None:
        """How long the launcher may go on; None while its ranks run."""
        if first_failure(self.folder, self.token, self.began_unix_seconds) is not None:
            return RESTART_SECONDS if self.restarts else FAILED_SECONDS
        status = read(self.folder)
        closed = status is not None and is_closed(status, self.token, self.began_unix_seconds)
        return DONE_SECONDS if closed else None

    def _on_signal(self, number: int, _frame: object) -> None:
        if number == signal.SIGINT:
            self.interrupts += 1
        self.cancelled = self.cancelled or number == signal.SIGTERM
        if self.process is None:
            self.asked = signal.Signals(number).name
        elif self.by_signal:
            # Slurm itself signals the ranks when a job is cancelled; SIGTERM to srun would kill them at once.
            if number == signal.SIGUSR1:
                self.process.send_signal(number)
        else:
            # deepspeed, torchrun and mpirun answer signals by ending ranks one after the other, before they could save.
            ask_to_go_on_later(self.folder, self.token)


def main(argv: Sequence[str]) -> int:
    """See the module."""
    args = _arguments(argv)
    supervisor = Supervisor(args.folder, args.command, by_signal=args.slurm and not args.ask_by_file,
                            token=args.token or uuid.uuid4().hex, restarts=args.restarts)
    supervisor.listen()
    code = _check_nodes(args, supervisor.token) if args.check_nodes else 0
    if code != 0:
        result = outcome(args.folder, supervisor.token, supervisor.began_unix_seconds, code)
    else:
        result = supervisor.run()
    status = close(args.folder, supervisor.token, supervisor.began_unix_seconds, result)
    if result.code not in (ExitCode.DONE, ExitCode.REQUEUE):
        _say(_failure(args.folder, result))
    if args.slurm and status is not None:
        _act(status, args.requeue and not supervisor.cancelled)
    return result.code


def _failure(folder: Path, result: Outcome) -> str:
    who = "the job" if result.rank is None else f"rank {result.rank} on {result.node}"
    lines = [f"{who} failed with exit code {result.code}: {result.reason}"]
    if result.rank:
        log = folder / NOTES_FOLDER / f"rank-{result.rank}.log"
        lines += [f"--- the end of {log}", failure_text(log), "---"]
    lines.append(f"the logs of all ranks are in {folder / NOTES_FOLDER}")
    return "\n".join(lines)


def _act(status: Status, may_requeue: bool) -> None:
    """Asks Slurm for what should follow. It would bring a cancelled job back too, so that is never asked for."""
    decision = decide(status, may_requeue)
    _say(f"{decision.action}: {decision.why}")
    if decision.action == "end":
        return
    job = process_environment().get("SLURM_JOB_ID", "")
    slurm_control.requeue(job, decision.action == "hold", _say)
    if decision.bad_nodes:
        # Slurm takes this of a pending job only, and ends us for the requeue. It is polite about that for KillWait.
        agreed, names = slurm_control.exclude_nodes(job, decision.bad_nodes)
        _say(f"nodes kept out of the next attempt: {names}" if agreed else
             f"these nodes could not be kept out of the next attempt: {names}")


def _check_nodes(args: argparse.Namespace, token: str) -> int:
    """Checks each node with one task, and notes the nodes that cannot train. Returns 0 when all can."""
    module = ("launchers.supervise.node_check", str(args.folder), str(args.devices))
    code, said = slurm_control.run_on_every_node(args.check_nodes, module, {ATTEMPT: token})
    for line in said.splitlines():
        note = note_from(json.loads(line)) if line.startswith("{") else None
        if note is not None:
            _say(note.reason)
            write_note_of_node(args.folder, note)
    return code


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="launchers.supervise.supervisor", allow_abbrev=False)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--slurm", action="store_true")
    parser.add_argument("--ask-by-file", action="store_true")
    parser.add_argument("--requeue", action="store_true")
    parser.add_argument("--check-nodes", type=int, default=0)
    parser.add_argument("--devices", type=int, default=0)
    parser.add_argument("--restarts", action="store_true")
    parser.add_argument("--token", help="name of the attempt, where several supervisors share it")
    parser.add_argument("command", nargs="+")
    return parser.parse_args(argv)


def _say(text: str) -> None:
    sys.stderr.write(f"trainyard: {text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    os.umask(os.umask(0o027) | 0o027)
    sys.exit(main(sys.argv[1:]))
