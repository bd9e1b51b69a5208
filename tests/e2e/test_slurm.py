"""On a real Slurm of three virtual nodes: the same losses as locally, through time limits, lost nodes and arrays."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.status import read
from tests.helpers.slurm import LocalSlurm, local_slurm, wait_until, why_not

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]

ROOT = Path(__file__).resolve().parents[2]
STEPS = 60
JOB = ("--launcher", "slurm", "--nodes", "2", "--ranks-per-node", "2", "--time", "30")
RUN = (f"run.steps={STEPS}", "checkpoint.every=15", "checkpoint.keep=9")


@pytest.fixture(scope="module")
def cluster():
    with local_slurm(nodes=3, cpus=2) as cluster:
        yield cluster


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


def test_the_warning_before_the_time_limit(cluster, recipe, tmp_path, expected):
    """The warning itself is Slurm's; it is given by hand here, and at its own time in `make faults`."""
    job_id = submit(cluster, recipe, tmp_path)
    wait_for_step(cluster, job_id, tmp_path, 18)
    cluster.run("scancel", "--batch", "--signal=USR1", job_id)
    cluster.start_requeued_now(job_id)
    before = read(tmp_path)
    assert (before.exit_code, before.reason) == (75, "SIGUSR1")
    assert before.checkpoint_step == before.last_step < STEPS
    assert cluster.wait_for_state(job_id) == "COMPLETED", log(tmp_path)
    assert cluster.job(job_id)["Restarts"] == "1"
    assert losses(tmp_path) == expected
    assert [entry["exit_code"] for entry in read(tmp_path).history] == [75]


def test_a_lost_node(cluster, recipe, tmp_path, expected):
    job_id = submit(cluster, recipe, tmp_path)
    wait_for_step(cluster, job_id, tmp_path, 18)
    first, lost = (node for node in ("n1", "n2", "n3") if node in read(tmp_path).nodes)
    cluster.kill_node(lost)
    cluster.run("scontrol", "update", f"nodename={lost}", "state=down", "reason=test")
    try:
        cluster.start_requeued_now(job_id)
        assert cluster.wait_for_state(job_id) == "COMPLETED", log(tmp_path)
    finally:
        cluster.start_node(lost)
        cluster.run("scontrol", "update", f"nodename={lost}", "state=resume")
    status = read(tmp_path)
    assert lost not in status.nodes
    assert status.exit_code == 0
    assert cluster.job(job_id)["Restarts"] == "1"
    assert losses(tmp_path) == expected
    assert first not in [entry["node"] for entry in status.history]  # nobody else is blamed


def test_a_killed_rank_is_named(cluster, recipe, tmp_path):
    job_id = submit(cluster, recipe, tmp_path, "--no-requeue")
    wait_for_step(cluster, job_id, tmp_path, 5)
    victim = next(path for path in Path("/proc").glob("[0-9]*") if b"SLURM_PROCID=3\0" in environ_of(path)
                  and f"SLURM_JOB_ID={job_id}\0".encode() in environ_of(path)
                  and path.joinpath("cmdline").read_bytes().split(b"\0")[2:3] == [b"pretrain"])
    subprocess.run(["kill", "-KILL", victim.name], check=True)
    assert cluster.wait_for_state(job_id) == "FAILED"
    status = read(tmp_path)
    assert (status.exit_code, status.rank) == (137, 3), log(tmp_path)
    assert "rank 3" in log(tmp_path)
    assert cluster.job(job_id)["ExitCode"] == "137:0"


def test_an_array_of_two_seeds(cluster, recipe, tmp_path):
    done = trainyard(cluster, "submit", str(recipe), "--launcher", "slurm", "--array", "run.seed=1,2", "--wait",
                     f"run.dir={tmp_path}", "run.steps=4")
    assert done.returncode == 0, done.stderr
    first, second = losses(tmp_path / "seed-1"), losses(tmp_path / "seed-2")
    assert len(first) == len(second) == 4
    assert first != second


def test_cancel_leaves_no_process(cluster, recipe, tmp_path):
    job_id = submit(cluster, recipe, tmp_path)
    wait_for_step(cluster, job_id, tmp_path, 5)
    done = trainyard(cluster, "cancel", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert cluster.wait_for_state(job_id) == "CANCELLED"
    wait_until(lambda: not ranks_of(job_id), 45, "no rank is left")
    wait_until(lambda: set(cluster.node_states().values()) == {"idle"}, 60, "the nodes are idle")
    assert cluster.job(job_id)["Restarts"] == "0"


def test_a_second_job_on_the_run_folder_is_refused(cluster, recipe, tmp_path):
    shape = ("--nodes", "1", "--ranks-per-node", "1")
    long = ("run.steps=100000", "checkpoint.every=0")
    job_id = submit(cluster, recipe, tmp_path, *shape, run=long)
    wait_for_step(cluster, job_id, tmp_path, 2)
    second = submit(cluster, recipe, tmp_path, *shape, "--no-node-check", "--name", "second", run=long)
    assert cluster.wait_for_state(second) == "FAILED"
    assert cluster.job(second)["ExitCode"] == "2:0"
    assert f"job {job_id}" in log(tmp_path)
    before = records(tmp_path)[-1]["step"]
    wait_for_step(cluster, job_id, tmp_path, before + 5)  # the first one goes on
    (tmp_path / "STOP").touch()
    assert cluster.wait_for_state(job_id) == "COMPLETED", log(tmp_path)
    status = read(tmp_path)
    assert (status.exit_code, status.reason, status.job_id) == (0, "STOP", job_id)
    assert status.checkpoint_step == status.last_step


@pytest.mark.parametrize("words", [
    ("--partition", "nowhere"), ("--nodes", "9"), ("--gpus-per-node", "8"), ("--time", "99-0"),
    ("--constraint", "imaginary"), ("--cpus-per-task", "64"),
])
def test_what_slurm_refuses_is_not_submitted(cluster, recipe, tmp_path, words):
    ranks = () if words[0] != "--nodes" else ("parallel.global_batch=36",)
    done = trainyard(cluster, "submit", str(recipe), *JOB, *words, f"run.dir={tmp_path}", *ranks)
    assert done.returncode == 2
    assert "sbatch" in done.stderr
    assert "nothing was submitted" in done.stderr
    assert str(tmp_path) not in cluster.run("squeue", "-h", "-o", "%Z %o")


def test_without_sbatch(recipe, tmp_path):
    environ = {"PATH": str(Path(shutil.which("true")).parent / "nothing"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "pretrain", "submit", str(recipe), *JOB, f"run.dir={tmp_path}"],
                          env=environ, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 2
    assert "sbatch, which is not on this machine" in done.stderr


def environ_of(path: Path) -> bytes:
    try:
        return path.joinpath("environ").read_bytes() + b"\0"
    except OSError:
        return b""


def ranks_of(job_id: str) -> list[str]:
    return [path.name for path in Path("/proc").glob("[0-9]*")
            if f"SLURM_JOB_ID={job_id}\0".encode() in environ_of(path)]
