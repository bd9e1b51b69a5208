"""On a real Slurm of three virtual nodes: the same losses as locally, through time limits, lost nodes and arrays."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launchers.run_folder.status import read
from tests.faults.bench import Bench
from tests.faults.rows import run_one
from tests.helpers.slurm import LocalSlurm, local_slurm, wait_until, why_not

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]

ROOT = Path(__file__).resolve().parents[2]
STEPS = 60
JOB = ("--launcher", "slurm", "--nodes", "2", "--ranks-per-node", "2", "--time", "30")
RUN = (f"run.steps={STEPS}", "checkpoint.every=15", "checkpoint.keep=9")


@pytest.fixture(scope="module")
def cluster():
    with local_slurm(nodes=3, cpus=4) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def bench(cluster, recipe, tmp_path_factory) -> Bench:
    return Bench(recipe, tmp_path_factory.mktemp("faults"), cluster)


@pytest.fixture(scope="module")
def expected(tmp_path_factory, recipe) -> list[float]:
    """Losses of the same run started on this machine, never interrupted."""
    folder = tmp_path_factory.mktemp("local")
    subprocess.run([sys.executable, "-m", "pretrain", "train", str(recipe), "--nproc", "4", f"run.dir={folder}", *RUN],
                   check=True, cwd=ROOT, timeout=400)
    return losses(folder)


def trainyard(cluster: LocalSlurm, *words: str) -> subprocess.CompletedProcess[str]:
    environ = cluster.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", "pretrain", *words], env=environ, capture_output=True, text=True,
                          check=False, timeout=600, cwd=ROOT)


def submit(cluster: LocalSlurm, recipe: Path, folder: Path, *words: str, run: tuple[str, ...] = RUN) -> str:
    done = trainyard(cluster, "submit", str(recipe), *JOB, f"run.dir={folder}", *run, *words)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[2].rstrip(":,")


def records(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [record for record in map(json.loads, lines) if "loss" in record]


def losses(folder: Path) -> list[float]:
    """Loss of every step; a step that was done twice must have given the same one."""
    seen: dict[int, float] = {}
    for record in records(folder):
        assert seen.setdefault(record["step"], record["loss"]) == record["loss"]
    assert sorted(seen) == list(range(1, len(seen) + 1))
    return [seen[step] for step in sorted(seen)]


def wait_for_step(cluster: LocalSlurm, job_id: str, folder: Path, step: int) -> None:
    def reached() -> bool:
        assert cluster.job(job_id)["JobState"] in ("PENDING", "CONFIGURING", "RUNNING"), log(folder)
        return any(record["step"] >= step for record in records(folder))

    wait_until(reached, 900, f"step {step}")


def log(folder: Path) -> str:
    return "\n".join(path.read_text(errors="replace") for path in sorted((folder / "logs").glob("slurm-*.out")))


def test_two_nodes_give_the_losses_of_one_machine(cluster, recipe, tmp_path, expected):
    done = trainyard(cluster, "submit", str(recipe), *JOB, "--wait", f"run.dir={tmp_path}", *RUN)
    assert done.returncode == 0, done.stderr + log(tmp_path)
    assert losses(tmp_path) == expected
    status = read(tmp_path)
    assert (status.exit_code, status.reason, status.last_step, len(status.nodes)) == (0, "done", STEPS, 2)
    said = trainyard(cluster, "status", str(tmp_path)).stdout
    assert "COMPLETED" in said
    assert f"{STEPS}" in said


def test_an_array_of_two_seeds(cluster, recipe, tmp_path):
    done = trainyard(cluster, "submit", str(recipe), "--launcher", "slurm", "--array", "run.seed=1,2", "--wait",
                     f"run.dir={tmp_path}", "run.steps=4")
    assert done.returncode == 0, done.stderr
    first, second = losses(tmp_path / "seed-1"), losses(tmp_path / "seed-2")
    assert len(first) == len(second) == 4
    assert first != second


# Row of tests/faults and the number of its trial. The warning before a time limit (F1) takes minutes: `make faults`.
SAMPLE = [("F2", 1), ("F5", 0), ("F6", 0), ("F8", 0), ("F12", 0), ("X2", 0), *(("F14", case) for case in range(9))]


@pytest.mark.parametrize(("name", "number"), SAMPLE, ids=str)
def test_row(cluster, bench, tmp_path, name, number):
    run_one(bench, name, number, tmp_path / "trial")
    wait_until(lambda: set(cluster.node_states().values()) == {"idle"}, 90, "the nodes are idle")


def test_one_task_a_node_with_torchrun_inside(cluster, recipe, tmp_path, expected):
    done = trainyard(cluster, "submit", str(recipe), *JOB, "--torchrun-inside", "--wait", f"run.dir={tmp_path}", *RUN)
    assert done.returncode == 0, done.stderr + log(tmp_path)
    assert losses(tmp_path) == expected


def test_limits_that_the_cluster_does_not_enforce_at_submission(recipe, tmp_path):
    """Slurm's default: such a job would wait for ever. It is cancelled, and the reason is told."""
    with local_slurm(nodes=2, cpus=2, enforce=False) as cluster:
        for words in (("--time", "99-0"), ("--cpus-per-task", "64")):
            done = trainyard(cluster, "submit", str(recipe), *JOB, *words, f"run.dir={tmp_path}")
            assert done.returncode == 2, done.stdout
            assert "would never start it: PartitionConfig. It was cancelled" in done.stderr
            assert cluster.run("squeue", "-h", "-o", "%i") == ""


def test_without_sbatch(recipe, tmp_path):
    environ = {"PATH": str(Path(shutil.which("true")).parent / "nothing"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "pretrain", "submit", str(recipe), *JOB, f"run.dir={tmp_path}"],
                          env=environ, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 2
    assert "sbatch, which is not on this machine" in done.stderr
