"""The same run through every launcher of one machine: losses equal to the last bit, and no orphan however it ends."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launchers.run_folder.status import read

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
RUN = ("run.steps=6",)
LAUNCHERS = [
    pytest.param("torchrun"),
    pytest.param("deepspeed", marks=pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None,
                                                       reason="deepspeed is not installed")),
    pytest.param("mpi", marks=pytest.mark.skipif(shutil.which("mpirun") is None, reason="no mpirun here: apt-get "
                                                 "install -y --no-install-recommends openmpi-bin")),
]


def environ(**more):
    kept = {name: text for name, text in os.environ.items() if not name.startswith(("SLURM", "OMPI", "RANK"))}
    return kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | more


def command(recipe, folder, launcher, *words):
    return [sys.executable, "-m", "pretrain", "submit", str(recipe), "--launcher", launcher, "--ranks-per-node", "2",
            f"run.dir={folder}", *words]


def losses(folder):
    records = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [record["loss"] for record in records if "loss" in record]


def ranks_in(folder):
    """Processes with this run folder among their words."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = path.joinpath("cmdline").read_bytes()
            state = path.joinpath("stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            continue
        if str(folder).encode() in words and state != "Z" and int(path.name) != os.getpid():
            found.append(int(path.name))
    return found


def wait_until(condition, seconds, what):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def expected(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("local")
    subprocess.run([sys.executable, "-m", "pretrain", "train", str(recipe), "--nproc", "2", f"run.dir={folder}", *RUN],
                   check=True, env=environ(), cwd=ROOT, timeout=400)
    return losses(folder)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_same_losses(launcher, recipe, tmp_path, expected):
    folder = tmp_path / "a $(touch ran) folder"
    done = subprocess.run(command(recipe, folder, launcher, *RUN), env=environ(), cwd=tmp_path, timeout=400,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(folder) == expected
    assert read(folder).exit_code == 0
    assert not (tmp_path / "ran").exists()
    assert ranks_in(folder) == []


def start(recipe, folder, launcher):
    with (folder.parent / "said").open("w") as said:
        process = subprocess.Popen(command(recipe, folder, launcher, "run.steps=100000"), env=environ(), cwd=ROOT,
                                   stdout=said, stderr=said, start_new_session=True)
    metrics = folder / "metrics.jsonl"

    def trains():
        assert process.poll() is None, (folder.parent / "said").read_text()
        return metrics.exists() and len(metrics.read_text().splitlines()) > 3

    wait_until(trains, 300, "some steps")
    return process


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_signal_saves_at_one_step(launcher, recipe, tmp_path):
    folder = tmp_path / "run"
    process = start(recipe, folder, launcher)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=300) == 75, (tmp_path / "said").read_text()
    status = read(folder)
    assert (status.exit_code, status.checkpoint_step) == (75, status.last_step)
    assert len(losses(folder)) == status.last_step
    assert ranks_in(folder) == []


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_killed_launcher_leaves_nothing(launcher, recipe, tmp_path):
    folder = tmp_path / "run"
    process = start(recipe, folder, launcher)
    below = [pid for pid in ranks_in(folder) if parent_of(pid) == process.pid]
    assert len(below) == 1
    os.kill(below[0], signal.SIGKILL)
    # 75 where the ranks, told by the supervisor, could still save in order.
    assert process.wait(timeout=300) != 0
    wait_until(lambda: ranks_in(folder) == [], 15, "no process is left")


def parent_of(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_killed_rank_is_named(launcher, recipe, tmp_path):
    folder = tmp_path / "run"
    process = start(recipe, folder, launcher)
    rank = next(pid for pid in ranks_in(folder)
                if b"\0-m\0pretrain\0" in Path(f"/proc/{pid}/cmdline").read_bytes()
                and b"\0RANK=1\0" in b"\0" + Path(f"/proc/{pid}/environ").read_bytes()
                or b"\0OMPI_COMM_WORLD_RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()
                and b"\0-m\0pretrain\0train" in Path(f"/proc/{pid}/cmdline").read_bytes())
    os.kill(rank, signal.SIGKILL)
    assert process.wait(timeout=300) == 137, (tmp_path / "said").read_text()
    assert (read(folder).exit_code, read(folder).rank) == (137, 1)
    assert "rank 1 on" in (tmp_path / "said").read_text()
    wait_until(lambda: ranks_in(folder) == [], 15, "no process is left")
