"""`trainyard selfcheck` in real processes: all well, and each way in which one rank can differ, named."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.ranks import run_ranks
from tests.helpers.recipes import write_recipe

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
ROOMS = ("data_pipeline", "launchers", "parallel", "pretrain")
OPERATIONS = {"all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send_recv"}


def selfcheck(*words: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "pretrain", "selfcheck", *words], capture_output=True, text=True,
                          timeout=300, check=False, cwd=ROOT, **options)


def test_four_ranks_with_two_tensor_ranks_are_well(recipe, tmp_path):
    folder = tmp_path / "run"
    done = selfcheck(str(recipe), "--nproc", "4", "--json", "parallel.tensor=2", f"run.dir={folder}")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["ok"] and report["findings"] == []
    assert [rank["rank"] for rank in report["ranks"]] == [0, 1, 2, 3]
    assert all(abs(rank["clock_offset_seconds"]) < 5 for rank in report["ranks"])
    speeds = {(speed["axis"], speed["operation"]): speed for speed in report["bytes_per_second"]}
    assert {axis for axis, _ in speeds} == {"tensor", "data", "world"}
    assert {operation for _, operation in speeds} == OPERATIONS
    assert len(speeds) == 18
    assert all(0 < speed["slowest"] <= speed["median"] for speed in speeds.values())
    assert not folder.exists(), "a check leaves nothing"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def two_ranks(folders: list[Path], words: list[str], paths: list[str]) -> list[subprocess.CompletedProcess]:
    """Each rank in a folder of its own and with Python files of its own, as on two nodes."""
    port, processes = str(free_port()), []
    for rank, (folder, path) in enumerate(zip(folders, paths, strict=True)):
        environ = {**os.environ, "PYTHONPATH": path, "RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2",
                   "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        processes.append(subprocess.Popen([sys.executable, "-m", "pretrain", "selfcheck", *words], cwd=folder,
                                          env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    try:
        outputs = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [subprocess.CompletedProcess([], process.returncode, *output)
            for process, output in zip(processes, outputs, strict=True)]


@pytest.fixture
def two_nodes(dataset, tmp_path):
    """Two folders with the same relative config and data, as if each were a node's own disk."""
    folders = [tmp_path / "node-0", tmp_path / "node-1"]
    for folder in folders:
        shutil.copytree(dataset, folder / "data")
        recipe = write_recipe(folder / "gpt.yaml", Path("data"))
        assert recipe.exists()
    return folders


def test_a_rank_that_sees_other_files_is_named(two_nodes, tmp_path):
    manifest = two_nodes[1] / "data" / "train" / "dataset.json"
    manifest.write_text(manifest.read_text() + "\n")
    other = tmp_path / "other-code"
    for room in ROOMS:
        shutil.copytree(ROOT / room, other / room, ignore=shutil.ignore_patterns("__pycache__"))
    with (other / "data_pipeline" / "order.py").open("a", encoding="utf-8") as file:
        file.write("# another version\n")
    (other / "safetensors-0.0.1.dist-info").mkdir()
    (other / "safetensors-0.0.1.dist-info" / "METADATA").write_text("Name: safetensors\nVersion: 0.0.1\n")
    done = two_ranks(two_nodes, ["gpt.yaml", "run.dir=run"], [str(ROOT), str(other)])
    assert [rank.returncode for rank in done] == [71, 71], done[0].stderr
    for words in ("code of data_pipeline is", "safetensors is 0.0.1", "data.train is", "does not see the file"):
        (line,) = [line for line in done[0].stdout.splitlines() if words in line]
        assert "rank 1 on" in line
    assert "4 problems" in done[0].stdout
    assert "all_reduce" in done[0].stdout, "what can be measured all the same is measured"


def test_a_rank_with_another_config_is_named_before_groups_are_built(two_nodes):
    path = two_nodes[1] / "gpt.yaml"
    path.write_text(path.read_text().replace("seed: 11", "seed: 12"))
    done = two_ranks(two_nodes, ["gpt.yaml", "--json", f"run.dir={two_nodes[0] / 'run'}"], [str(ROOT)] * 2)
    assert [rank.returncode for rank in done] == [71, 71], done[0].stderr
    report = json.loads(done[0].stdout)
    assert [(finding["rank"], finding["text"][:9]) for finding in report["findings"]] == [(1, "config is")]
    path.unlink()  # then it has none at all, and must not leave the other waiting
    done = two_ranks(two_nodes, ["gpt.yaml", "run.dir=run"], [str(ROOT)] * 2)
    assert [rank.returncode for rank in done] == [71, 71]
    assert "rank 1 on" in done[0].stdout and "config is refused" in done[0].stdout


def check_with_a_bad_rank(info, how: str) -> tuple[int, str]:
    import torch.distributed as dist

    from common.errors import NodeSuspected
    from parallel.ranks.rendezvous import join
    from pretrain.selfcheck.check import check

    if info.rank == 1 and how == "hangs":
        join(info)
        time.sleep(10)
        return 0, ""
    if info.rank == 1 and how == "adds one":
        broadcast = dist.broadcast

        def wrong(tensor, *args, **kwargs):
            broadcast(tensor, *args, **kwargs)
            tensor.add_(1)

        dist.broadcast = wrong
    try:
        report = check(info, None, None, [], num_bytes=4096, timeout_seconds=4.0 if how == "hangs" else 60.0)
    except NodeSuspected as error:
        return error.rank, str(error)
    return int(report.exit_code), " | ".join(f"{found.rank} {found.text}" for found in report.findings)


def test_a_rank_that_hangs_is_named():
    for rank, (suspect, text) in enumerate(run_ranks(check_with_a_bad_rank, 3, "hangs")):
        if rank != 1:
            assert suspect == 1, text
            assert "rank 1, which hangs or died" in text


def test_a_wrong_answer_is_found():
    found = run_ranks(check_with_a_bad_rank, 2, "adds one")
    assert found == [(71, "1 broadcast over data (ranks 0, 1) brought it a wrong answer")] * 2


@pytest.mark.parametrize(("launcher", "needs"), [
    (["torchrun", "--nproc-per-node", "2", "-m", "pretrain"], "torch"),
    (["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable, "-m", "pretrain"], "mpirun"),
], ids=["torchrun", "mpirun"])  # fmt: skip
def test_under_a_launcher(launcher, needs, recipe, tmp_path):
    if needs == "mpirun" and shutil.which("mpirun") is None:
        pytest.skip("no mpirun here: apt-get install openmpi-bin")
    if launcher[0] == "torchrun":
        launcher = [sys.executable, "-m", "torch.distributed.run", *launcher[1:]]
        assert importlib.util.find_spec("torch.distributed.run")
    done = subprocess.run([*launcher, "selfcheck", str(recipe), "parallel.pipeline=2", f"run.dir={tmp_path / 'run'}"],
                          capture_output=True, text=True, timeout=300, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "2 ranks on 1 node" in done.stdout
    assert "pipeline (2)" in done.stdout
    assert done.stdout.rstrip().endswith("all well")


@pytest.mark.parametrize(("words", "told"), [
    (["--nproc", "0"], "--nproc 0"), (["--mib", "-3"], "--mib -3"), (["--timeout", "0"], "--timeout 0"),
    (["nowhere.yaml"], "nowhere.yaml"), (["RECIPE", "parallel.tensr=2"], "parallel.tensor"),
    (["RECIPE", "--nproc", "3", "parallel.tensor=2"], "2 or 4 ranks"),
], ids=str)  # fmt: skip
def test_mistakes(words, told, recipe):
    done = selfcheck(*(str(recipe) if word == "RECIPE" else word for word in words))
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr


def test_a_rank_of_a_launcher_takes_no_nproc(recipe):
    environ = {**os.environ, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    done = selfcheck("--nproc", "2", env=environ)
    assert done.returncode == 2
    assert "leave --nproc out" in done.stderr
