"""Job -> argv or script text: pure functions, and values that try to run something."""

import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from common.shipped_files import shipped_folder
from launchers import slurm_control, with_deepspeed, with_mpi, with_slurm, with_torchrun
from launchers.job import Job, Slurm, slurm_problems
from tests.faults.hostile import FIELDS, HOSTILE, LAUNCHERS, run_hostile, with_value

ROOT = Path(__file__).resolve().parents[3]
JOB = Job(name="tiny", config=Path("/data/tiny.yaml"), folder=Path("/runs/tiny"), work_dir=Path("/srv"),
          python="/venv/bin/python", overrides=("run.seed=7",), ranks_per_node=2)


def script_of(job):
    return with_slurm.script(job, (shipped_folder("slurm") / with_slurm.TEMPLATE).read_text())


def test_hostile_values_are_forty():
    assert len(HOSTILE) == 40


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_hostile_values_run_nothing(launcher, field, tmp_path):
    """All forty for Slurm, where a script is written; ten for the commands of the others (all in `make faults`)."""
    accepted = run_hostile(launcher, field, tmp_path, HOSTILE if launcher == "slurm" else HOSTILE[::4])
    assert (accepted == 0) == (field in ("name", "partition"))


@pytest.mark.parametrize("field", ["name", "partition"])
def test_names_are_allow_listed(field):
    for text in HOSTILE:
        job = with_value(JOB, field, text.format(marker="x"))
        assert [*job.problems(), *slurm_problems(job)], text


def test_line_breaks_are_refused_everywhere():
    for field in ("folder", "config", "override", "variable", "image"):
        for text in ("a\nb", "a\rb", "a\x00b", "a\u2028b"):
            job = with_value(JOB, field, text)
            problems = [*job.problems(), *slurm_problems(job)]
            assert problems, (field, text)
            assert "line breaks" in problems[0].possible


@pytest.mark.parametrize("name", ["WANDB_API_KEY", "MY_TOKEN", "DB_PASSWORD", "AWS_SECRET_ACCESS_KEY"])
def test_secrets_stay_out(name):
    assert list(replace(JOB, variables=((name, "x"),)).problems())
    assert list(replace(JOB, exported=(name,)).problems())


def test_the_batch_script():
    job = replace(JOB, nodes=2, slurm=Slurm(partition="gpu", time="1-0", account="lab", gpus_per_node="8",
                                            cpus_per_task=4, exclude="n[7-8]", signal_seconds=600))
    script = script_of(job)
    assert script.startswith("#!/bin/bash\n")
    assert "\r" not in script
    for line in ("--job-name=tiny", "--nodes=2", "--ntasks=4", "--ntasks-per-node=2", "--partition=gpu", "--time=1-0",
                 "--account=lab", "--gpus-per-node=8", "--cpus-per-task=4", "--exclude=n[7-8]", "--signal=B:USR1@600",
                 "--requeue"):
        assert f"#SBATCH {line}\n" in script
    assert "--export=HOME,USER" in script
    assert "srun --nodes=2 --ntasks=4 --ntasks-per-node=2 --export=ALL --kill-on-bad-exit=1" in script
    assert "--slurm --requeue --check-nodes=2 --devices=2" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


def test_an_array_has_a_folder_for_each_element():
    job = replace(JOB, array=(("run.seed=1", "run.dir=runs/a b"), ("run.seed=2", "run.dir=runs/$x")))
    script = script_of(job)
    assert "#SBATCH --array=0-1\n" in script
    assert "0) folder='/srv/runs/a b'; overrides=(run.seed=1 'run.dir=runs/a b') ;;" in script
    assert "1) folder='/srv/runs/$x'; overrides=(run.seed=2 'run.dir=runs/$x') ;;" in script


def test_links_of_a_chain_are_not_requeued():
    assert "--slurm --check-nodes" in script_of(replace(JOB, slurm=Slurm(chain=5)))
    assert slurm_control.submit_argv("x", "12") == ["sbatch", "--parsable", "--dependency=afterany:12",
                                                 "--kill-on-invalid-dep=yes", "x"]


def test_torchrun_inside_has_one_task_a_node():
    script = script_of(replace(JOB, nodes=2, ranks_per_node=4, slurm=Slurm(torchrun_inside=True)))
    assert "srun --nodes=2 --ntasks=2 --ntasks-per-node=1 " in script
    assert "--nproc-per-node=4" in script


def test_torchrun():
    single = with_torchrun.argv(JOB)
    assert "--local-addr=127.0.0.1" in single
    assert "--rdzv-conf=store_type=file" in single
    assert single[-5:] == ["launchers.supervise.rank_wrapper", "/runs/tiny", "train", "/data/tiny.yaml", "run.seed=7"]
    many = replace(JOB, nodes=2, node_rank=1, master_address="n1", master_port=29500)
    assert not list(with_torchrun.problems(many))
    assert {"--nnodes=2", "--node-rank=1", "--master-addr=n1", "--master-port=29500"} <= set(with_torchrun.argv(many))
    elastic = replace(many, elastic="1:2", restarts=3)
    assert {"--nnodes=1:2", "--rdzv-backend=c10d", "--rdzv-endpoint=n1:29500", "--max-restarts=3"} <= set(
        with_torchrun.argv(elastic))
    for broken in (replace(many, node_rank=2), replace(many, master_port=None), replace(many, elastic="3:2")):
        assert list(with_torchrun.problems(broken))


def test_deepspeed():
    argv = with_deepspeed.argv(JOB)
    assert {"--num_nodes=1", "--num_gpus=2", "--master_addr=127.0.0.1", "--module"} <= set(argv)
    wrapper = ROOT / "launchers" / "supervise" / "rank_wrapper.py"
    for remote, script in (("openmpi", "launchers.supervise.rank_wrapper"), ("slurm", str(wrapper))):
        argv = with_deepspeed.argv(replace(JOB, hostfile=Path("/hosts"), remote=remote))
        assert {"--force_multi", "--no_ssh_check", f"--launcher={remote}", script} <= set(argv)
        assert not [word for word in argv if word.startswith("--num_")]  # deepspeed refuses them, or asks for GPUs
    many = replace(JOB, nodes=2, hostfile=Path("/hosts"), remote="pdsh")
    assert not list(with_deepspeed.problems(many, "n1 slots=2\nn2 slots=2 # spare\n"))
    assert {"--hostfile=/hosts", "--launcher=pdsh"} <= set(with_deepspeed.argv(many))


@pytest.mark.parametrize(("change", "hostfile", "message"), [
    ({"hostfile": None, "nodes": 2}, None, "none"),
    ({}, None, "not there"),
    ({}, "n1 slots=two\n", "line 1"),
    ({}, "n1 slots=2\nn1 slots=2\n", "twice"),
    ({}, "\n", "names no node"),
    ({"nodes": 3}, "n1 slots=2\nn2 slots=2\n", "3"),
    ({"ranks_per_node": 4}, "n1 slots=2\nn2 slots=2\n", "4"),
    ({"include": "n9:0"}, "n1 slots=2\n", "n9"),
    ({"include": "n1", "exclude": "n1"}, "n1 slots=2\n", "n1"),
    ({"no_ssh": True}, "n1 slots=2\n", "no --node-rank"),
    ({"remote": "slurm"}, "n1 slots=4\n", "1 nodes with 4 slots"),
    ({"remote": "openmpi", "hostfile": None}, None, "none"),
    ({"remote": "pdsh", "variables": (("NOTE", "x"),)}, "n1 slots=2\n", "NOTE"),
    ({"nodes": 2, "overrides": ("run.dir=a b",)}, "n1 slots=2\nn2 slots=2\n", "a b"),
])
def test_deepspeed_problems(change, hostfile, message):
    job = replace(JOB, **{"hostfile": Path("/hosts")} | change)
    assert any(message in problem.asked for problem in with_deepspeed.problems(job, hostfile))


def test_mpi():
    argv = with_mpi.argv(replace(JOB, variables=(("NCCL_DEBUG", "INFO"),)))
    assert argv[:3] == ["mpirun", "-n", "2"]
    assert "ppr:2:node:OVERSUBSCRIBE" in argv
    assert "NCCL_DEBUG" in argv
    assert list(with_mpi.problems(replace(JOB, nodes=2), None))


@pytest.mark.parametrize(("change", "hostfile", "message"), [
    ({}, None, "not there"),
    ({"nodes": 2}, "n1\n", "2"),
    ({"ranks_per_node": 4}, "n1 slots=2\n", "4"),
])
def test_mpi_problems(change, hostfile, message):
    job = replace(JOB, **{"hostfile": Path("/hosts")} | change)
    assert any(message in problem.asked for problem in with_mpi.problems(job, hostfile))
    assert not list(with_mpi.problems(replace(JOB, hostfile=Path("/hosts")), "n1 slots=2\nn2 # spare\n"))


def test_ports_and_devices():
    assert "export MASTER_PORT=29777\n" in script_of(replace(JOB, master_port=29777))
    too_many = replace(JOB, ranks_per_node=8, slurm=Slurm(gpus_per_node="h100:4"))
    assert [problem.where for problem in slurm_problems(too_many)] == ["--ranks-per-node"]


@pytest.mark.parametrize(("change", "message"), [
    (("@srun", "@sruns"), "@sruns"), (("@srun", "srun"), "without @srun"), (("@name", "a @ b"), "a single @"),
])
def test_templates_of_a_cluster(change, message):
    text = (shipped_folder("slurm") / with_slurm.TEMPLATE).read_text()
    assert not list(with_slurm.template_problems(JOB, text, "--template x"))
    problems = with_slurm.template_problems(JOB, text.replace(*change), "--template x")
    assert any(message in problem.asked for problem in problems)


def test_supervisors_of_a_job_started_by_hand_share_its_name():
    by_hand = replace(JOB, nodes=2, master_address="n1", master_port=29500)
    assert replace(by_hand, node_rank=0).token == replace(by_hand, node_rank=1).token == "tiny@n1:29500"
    assert JOB.token is None


@pytest.mark.parametrize("change", [
    {"time": "soon"}, {"time": "1:99"}, {"account": "a b"}, {"qos": "-q"}, {"constraint": "a;b"}, {"exclude": "n1 n2"},
    {"memory": "lots"}, {"gpus_per_node": "8 "}, {"cpus_per_task": 0}, {"chain": 0}, {"signal_seconds": -1},
])
def test_slurm_problems(change):
    assert list(slurm_problems(replace(JOB, slurm=Slurm(**change))))


@pytest.mark.parametrize("time", ["30", "1:00:00", "2-0", "2-12:30", "90:00"])
def test_times(time):
    assert not list(slurm_problems(replace(JOB, slurm=Slurm(time=time))))


@pytest.mark.parametrize("launch", [with_torchrun.argv, with_deepspeed.argv, with_mpi.argv])
def test_words_survive_a_shell(launch):
    for text in HOSTILE:
        job = replace(JOB, overrides=(f"run.dir={text}",))
        if not list(job.problems()):
            assert shlex.split(shlex.join(launch(job))) == launch(job)
