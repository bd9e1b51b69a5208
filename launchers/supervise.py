"""Runs a launcher (srun, deepspeed, torchrun, mpirun) for one attempt, and answers for how it ends.

Launchers lose exit codes, die and leave ranks behind, or wait for ranks that are gone. This process, above them, passes
on the wish to save, ends what is left, completes status.json, gives the first failing rank's own code, and under Slurm
asks for the next attempt. ``python -m launchers.supervise RUN_FOLDER [options] -- COMMAND...``
"""

import argparse
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launchers.outcome import Outcome, close, decide, is_closed, outcome
from launchers.processes import adopt_orphans, end_descendants
from launchers.rank_logs import failure_text
from parallel.rank_info import ATTEMPT, process_environment
from pretrain.errors import ExitCode
from pretrain.status import NOTES_FOLDER, first_failure, read

POLL_SECONDS = 0.2
# A launcher that goes on after a rank has failed, or after all ranks are done, is ended after this time.
FAILED_SECONDS, DONE_SECONDS, POLITE_SECONDS = 15.0, 60.0, 8.0
STOP_REQUEST = "STOP.requeue"
# scontrol: asking again would not help, or Slurm has requeued the job already.
FINAL_ANSWERS = ("Invalid", "not permitted", "pending execution")


@dataclass
class Supervisor:
    """One attempt. ``slurm``: signals go to srun, which passes them on; else ranks are asked through a file."""

    folder: Path
    command: Sequence[str]
    slurm: bool
    token: str
    began_unix_seconds: float = field(default_factory=time.time)
    process: subprocess.Popen[bytes] | None = None
    interrupts: int = 0

    def run(self) -> Outcome:
        """Runs the command to its end, and everything below it too."""
        adopt_orphans()
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        # A session of its own: what a terminal or scheduler sends to our group is passed on by us, once.
        self.process = subprocess.Popen(list(self.command), stdin=subprocess.DEVNULL, start_new_session=True,
                                        env=process_environment() | {ATTEMPT: self.token})
        self._wait()
        if self.process.returncode is None or not self.slurm:
            end_descendants(POLITE_SECONDS if self.interrupts < 2 else 0)
        code = self.process.wait()
        return outcome(self.folder, self.token, self.began_unix_seconds, 128 - code if code < 0 else code)

    def _wait(self) -> None:
        give_up = float("inf")
        while self.process.poll() is None and self.interrupts < 2:
            if give_up == float("inf"):
                give_up = time.monotonic() + self._patience_seconds()
            if time.monotonic() > give_up:
                _say("the launcher does not end though its ranks have: ending it")
                return
            time.sleep(POLL_SECONDS)

    def _patience_seconds(self) -> float:
        if first_failure(self.folder, self.token) is not None:
            return FAILED_SECONDS
        status = read(self.folder)
        closed = status is not None and is_closed(status, self.token, self.began_unix_seconds)
        return DONE_SECONDS if closed else float("inf")

    def _on_signal(self, number: int, _frame: object) -> None:
        if number == signal.SIGINT:
            self.interrupts += 1
        if self.slurm:
            # Slurm itself signals the ranks when a job is cancelled; SIGTERM to srun would kill them at once.
            if number == signal.SIGUSR1 and self.process is not None:
                self.process.send_signal(number)
            return
        # deepspeed, torchrun and mpirun answer signals by ending ranks one after the other, before they could save.
        (self.folder / STOP_REQUEST).touch()


def main(argv: Sequence[str]) -> int:
    """See the module."""
    args = _arguments(argv)
    supervisor = Supervisor(args.folder, args.command, args.slurm, uuid.uuid4().hex)
    code = _check_nodes(args, supervisor.token) if args.check_nodes else 0
    if code != 0:
        result = outcome(args.folder, supervisor.token, supervisor.began_unix_seconds, code)
    else:
        result = supervisor.run()
    status = close(args.folder, supervisor.token, supervisor.began_unix_seconds, result)
    if result.code not in (ExitCode.DONE, ExitCode.REQUEUE):
        _say(_failure(args.folder, result))
    if args.slurm and status is not None:
        _act(args, status)
    return result.code


def _failure(folder: Path, result: Outcome) -> str:
    who = "the job" if result.rank is None else f"rank {result.rank} on {result.node}"
    lines = [f"{who} failed with exit code {result.code}: {result.reason}"]
    if result.rank:
        log = folder / NOTES_FOLDER / f"rank-{result.rank}.log"
        lines += [f"--- the end of {log}", failure_text(log), "---"]
    lines.append(f"the logs of all ranks are in {folder / NOTES_FOLDER}")
    return "\n".join(lines)


def _act(args: argparse.Namespace, status: object) -> None:
    """Asks Slurm for what should follow. The requeue ends this process too, so it comes last."""
    decision = decide(status, args.requeue)
    _say(f"{decision.action}: {decision.why}")
    if decision.action == "end":
        return
    job = process_environment().get("SLURM_JOB_ID", "")
    if decision.bad_nodes:
        nodes = ",".join(decision.bad_nodes)
        _say(f"nodes kept out of the next attempt: {nodes}")
        _scontrol("update", f"JobId={job}", f"ExcNodeList={nodes}")
    _scontrol("requeuehold" if decision.action == "hold" else "requeue", job)


def _scontrol(*words: str) -> None:
    for pause in (2, 5, 15, 60, 0):  # the controller may be away for a moment
        done = subprocess.run(["scontrol", *words], capture_output=True, text=True, timeout=120, check=False)
        if done.returncode == 0:
            return
        _say(f"scontrol {words[0]}: {done.stderr.strip()}")
        if any(text in done.stderr for text in FINAL_ANSWERS):
            return
        time.sleep(pause)


def _check_nodes(args: argparse.Namespace, token: str) -> int:
    """One task a node looks whether it can train; the nodes that cannot are in the notes."""
    nodes = args.check_nodes
    command = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--export=ALL", "--mpi=none",
               "--input=none", sys.executable, "-m", "launchers.node_check", str(args.folder), str(args.devices)]
    return subprocess.run(command, stdin=subprocess.DEVNULL, check=False,
                          env=process_environment() | {ATTEMPT: token}).returncode


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="launchers.supervise", allow_abbrev=False)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--slurm", action="store_true")
    parser.add_argument("--requeue", action="store_true")
    parser.add_argument("--check-nodes", type=int, default=0)
    parser.add_argument("--devices", type=int, default=0)
    parser.add_argument("command", nargs="+")
    return parser.parse_args(argv)


def _say(text: str) -> None:
    sys.stderr.write(f"trainyard: {text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    os.umask(os.umask(0o027) | 0o027)
    sys.exit(main(sys.argv[1:]))
