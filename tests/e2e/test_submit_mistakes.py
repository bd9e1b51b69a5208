"""Mistakes at `trainyard submit`: exit code 2, the value, what is possible; no run folder is begun, nothing runs."""

from __future__ import annotations

import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from launchers.run_folder.run_lock import RunLock
from parallel.ranks.rank_info import alone, process_environment

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
CASES = {  # name: (launcher, words, text of a hostfile or None, what the message must hold)
    "no hostfile": ("deepspeed", ["--nodes", "2", "--hostfile", "{folder}/nowhere"], None, ["not there", "slots=N"]),
    "no hostfile for mpi": ("mpi", ["--nodes", "2"], None, ["--hostfile", "none"]),
    "unknown node": ("deepspeed", ["--hostfile", "{hostfile}", "--include", "n9:0"], "localhost slots=2\n",
                     ["n9", "localhost"]),
    "a node without an address": ("mpi", ["--nodes", "2", "--hostfile", "{hostfile}"], "localhost\nno-such.invalid\n",
                                  ["no-such.invalid", "find"]),
    "more ranks than slots": ("mpi", ["--ranks-per-node", "4", "--hostfile", "{hostfile}"], "localhost slots=2\n",
                              ["4", "2 slots on localhost"]),
    "more ranks than devices": ("slurm", ["--ranks-per-node", "4", "--gpus-per-node", "2"], None, ["4", "at most 2"]),
    "an option of another launcher": ("torchrun", ["--partition", "gpu"], None, ["--partition", "--launcher slurm"]),
    "no such template": ("slurm", ["--template", "{folder}/nowhere", "--print"], None, ["nowhere", "No such file"]),
    "nodes that do not know the first": ("torchrun", ["--nodes", "2"], None, ["--master-address"]),
    "an environment variable with a secret": ("slurm", ["--export", "MY_TOKEN"], None, ["MY_TOKEN", "0600"]),
}


def submit(recipe, folder, launcher, *words):
    return subprocess.run(
        [sys.executable, "-m", "pretrain", "submit", str(recipe), "--launcher", launcher, f"run.dir={folder / 'run'}",
         *words], env=process_environment() | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
        cwd=folder, timeout=300)


def check(done, wanted, run):
    assert done.returncode == 2, done.stdout + done.stderr
    for part in wanted:
        assert part in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert not (run / "logs").exists()


@pytest.mark.parametrize("name", CASES)
def test_mistake(name, recipe, tmp_path):
    launcher, words, hostfile, wanted = CASES[name]
    (tmp_path / "hosts").write_text(hostfile or "")
    words = [word.format(folder=tmp_path, hostfile=tmp_path / "hosts") for word in words]
    check(submit(recipe, tmp_path, launcher, *words), wanted, tmp_path / "run")


@contextmanager
def taken_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_a_port_in_use(launcher, recipe, tmp_path):
    with taken_port() as port:
        done = submit(recipe, tmp_path, launcher, "--master-port", str(port))
    check(done, [str(port), "in use"], tmp_path / "run")


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_a_run_folder_that_another_run_writes(launcher, recipe, tmp_path):
    with RunLock(tmp_path / "run", alone()):
        done = submit(recipe, tmp_path, launcher)
    check(done, ["is being written by another run", "choose another run.dir"], tmp_path / "run")
