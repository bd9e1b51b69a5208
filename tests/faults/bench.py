"""What every row of the fault matrix uses: runs, their processes, and the rules that hold after each of them."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launchers.run_folder.status import Status, read
from pretrain.checkpoint.locate import checkpoints_at
from pretrain.checkpoint.manifest import damaged_files, read_manifest
from pretrain.training.metrics import read_metrics
from tests.helpers.slurm import LocalSlurm, wait_until

ROOT = Path(__file__).resolve().parents[2]
INJECT = Path(__file__).with_name("inject")
STEPS = 240
# Long enough that a fault comes in time on an idle machine too.
RUN = (f"run.steps={STEPS}", "checkpoint.every=40", "checkpoint.keep=9", "parallel.global_batch=32")
ORPHAN_SECONDS = 15
START_SECONDS = 600  # for ranks to come up on a busy machine; no row's own limit
RANK_VARIABLES = (b"RANK", b"SLURM_PROCID", b"OMPI_COMM_WORLD_RANK")


@dataclass
class Trial:
    """One trial of a row: its number, its own randomness and folder, and what it measured."""

    number: int
    seed: int
    folder: Path
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.run = self.folder / "run"


class Bench:
    """A recipe, a cluster for the rows that need one, and the losses of runs that nothing disturbed."""

    def __init__(self, recipe: Path, folder: Path, cluster: LocalSlurm | None = None):
        self.recipe, self.folder, self.cluster = recipe, folder, cluster
        self._references: dict[tuple[int, tuple[str, ...]], list[tuple[float, float]]] = {}
        self._num_references = 0
        self._lock = threading.Lock()

    def environ(self, **more: str) -> dict[str, str]:
        """Of a person who starts a run: no variables of another launcher, the cluster's where there is one."""
        base = self.cluster.environ if self.cluster else os.environ
        kept = {name: text for name, text in base.items()
                if not name.startswith(("SLURM_", "SBATCH", "OMPI_", "MASTER_", "FAULT_", "TRAINYARD_"))
                and name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE") or name == "SLURM_CONF"}
        return kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | more

    def trainyard(self, *words: str, timeout_seconds: float = START_SECONDS,
                  **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "pretrain", *words], env=self.environ(**environ), cwd=ROOT,
                              capture_output=True, text=True, check=False, timeout=timeout_seconds)

    def reference(self, num_ranks: int, run: tuple[str, ...] = RUN, at_least: int = 0) -> list[tuple[float, float]]:
        """Loss and gradient norm of every step of the same run, started on this machine and never disturbed.

        ``at_least``: so many steps, for a run whose own number of steps is open.
        """
        with self._lock:
            known = self._references.get((num_ranks, run), [])
            if not known or len(known) < at_least:
                folder = self.folder / f"reference-{self._num_references}"
                self._num_references += 1
                steps = (f"run.steps={at_least * 5 // 4}",) if at_least else ()
                done = self.trainyard(*self.train_words(folder, num_ranks, (*run, *steps)), timeout_seconds=1800)
                assert done.returncode == 0, done.stdout + done.stderr
                self._references[num_ranks, run] = losses(folder)
            return self._references[num_ranks, run]

    def train_words(self, run_folder: Path, num_ranks: int = 2, run: tuple[str, ...] = RUN) -> list[str]:
        return ["train", str(self.recipe), "--nproc", str(num_ranks), f"run.dir={run_folder}", *run]

    def submit_words(self, run_folder: Path, launcher: str, *words: str, num_ranks: int = 2,
                     run: tuple[str, ...] = RUN) -> list[str]:
        return ["submit", str(self.recipe), "--launcher", launcher, "--ranks-per-node", str(num_ranks),
                f"run.dir={run_folder}", *run, *words]

    @contextmanager
    def started(self, trial: Trial, words: list[str], **environ: str) -> Iterator[Started]:
        """A run in the background; whatever is left of it in the end is killed."""
        said = trial.folder / "said"
        with said.open("w") as output:
            process = subprocess.Popen([sys.executable, "-m", "pretrain", *words], env=self.environ(**environ),
                                       cwd=ROOT, stdout=output, stderr=output, start_new_session=True)
        try:
            yield Started(process, trial.run, said)
        finally:
            process.kill()
            process.wait()
            for pid in processes_of(trial.run):
                _kill(pid)


@dataclass
class Started:
    """A run in the background."""

    process: subprocess.Popen[bytes]
    run: Path
    said_path: Path

    @property
    def said(self) -> str:
        return self.said_path.read_text(errors="replace")

    def wait_for_step(self, step: int) -> None:
        def reached() -> bool:
            assert self.process.poll() is None, f"ended with {self.process.returncode}: {self.said}"
            return last_step(self.run) >= step

        wait_until(reached, START_SECONDS, f"step {step}: {self.said[-2000:]}")

    def wait(self, seconds: float) -> int:
        """The exit code; an AssertionError after this time."""
        try:
            return self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"runs on after {seconds} s: {self.said[-2000:]}") from None


def losses(folder: Path) -> list[tuple[float, float]]:
    """Loss and gradient norm by step; every step once, without a gap."""
    records = read_metrics(folder / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    return [(record["loss"], record["grad_norm"]) for record in records]


def last_step(folder: Path) -> int:
    return max((record["step"] for record in read_metrics(folder / "metrics.jsonl")), default=0)


def check_end(folder: Path, expected: list[tuple[float, float]], whole: bool = False) -> Status:
    """The rules for the end of any run: nobody is left, nothing is partial, the status is there, every step is exact.

    ``whole``: the run went to its last step. Returns the status.
    """
    wait_until(lambda: not processes_of(folder), ORPHAN_SECONDS, f"orphans of {folder}: {processes_of(folder)}")
    for checkpoint in checkpoints_at(folder):
        assert damaged_files(checkpoint, read_manifest(checkpoint)["files"]) == []
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert all(isinstance(json.loads(line), dict) for line in lines)
    found = losses(folder)
    assert found == expected[:len(found)], "the losses differ from those of the undisturbed run"
    assert not whole or len(found) == len(expected), f"{len(found)} of {len(expected)} steps"
    status = read(folder)
    assert status is not None, "no status.json"
    assert status.exit_code is not None, f"status.json says that it runs: {status}"
    assert status.last_checkpoint is None or (folder / "checkpoints" / status.last_checkpoint).is_dir()
    return status


def check_saved(status: Status, reason: str) -> None:
    """All ranks saved at one step and want to go on."""
    assert (status.exit_code, status.reason) == (75, reason), status
    assert status.checkpoint_step == status.last_step > 0, status


def check_goes_on(bench: Bench, trial: Trial, num_ranks: int = 2) -> None:
    """Started again on this machine, the run repeats the undisturbed one to its last step."""
    done = bench.trainyard(*bench.train_words(trial.run, num_ranks))
    assert done.returncode == 0, done.stdout + done.stderr
    check_end(trial.run, bench.reference(num_ranks), whole=True)


def processes_of(folder: Path) -> list[int]:
    """Processes with this run folder among their words, but not this one."""
    return [pid for pid, words, _ in _processes() if _names(words, folder) and pid != os.getpid()]


def ranks_of(folder: Path) -> dict[int, int]:
    """Process id of every rank of a run that launchers started."""
    found = {}
    for pid, words, environ in _processes():
        if _names(words, folder) and words[1:4] == [b"-m", b"pretrain", b"train"]:
            number = next((environ[name] for name in RANK_VARIABLES if name in environ), None)
            if number is not None:
                found[int(number)] = pid
    return found


def launcher_processes(folder: Path, module: bytes) -> list[int]:
    """Processes `python -m MODULE` of a run."""
    return [pid for pid, words, _ in _processes() if _names(words, folder) and module in words[1:4]]


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def seconds_until(condition: Callable[[], bool], seconds: float, what: str) -> float:
    """How long it took; an AssertionError when it did not happen."""
    started = time.monotonic()
    wait_until(condition, seconds, what)
    return time.monotonic() - started


def _names(words: list[bytes], folder: Path) -> bool:
    return any(str(folder).encode() in word for word in words)


def _processes() -> Iterator[tuple[int, list[bytes], dict[bytes, bytes]]]:
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if path.joinpath("stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                continue
            words = path.joinpath("cmdline").read_bytes().split(b"\0")
            entries = path.joinpath("environ").read_bytes().split(b"\0")
        except (OSError, IndexError):
            continue
        yield int(path.name), words, dict(entry.partition(b"=")[::2] for entry in entries)


def _kill(pid: int) -> None:
    try:
        os.kill(pid, 9)
    except ProcessLookupError:
        return
