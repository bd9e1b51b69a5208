"""Job -> argv or script text: pure functions, and values that try to run something."""

import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from launchers import with_deepspeed, with_mpi, with_slurm, with_torchrun
from launchers.job import Job, Slurm, slurm_problems
from parallel.rank_info import process_environment
from pretrain.shipped import shipped_folder

JOB = Job(name="tiny", config=Path("/data/tiny.yaml"), folder=Path("/runs/tiny"), work_dir=Path("/srv"),
          python="/venv/bin/python", overrides=("run.seed=7",), ranks_per_node=2)
MARKER = "touch {marker}"
HOSTILE = [
    "$(touch {marker})", "`touch {marker}`", "; touch {marker}", "& touch {marker} &", "| touch {marker}",
    "|| touch {marker}", "&& touch {marker}", "' ; touch {marker} ; '", '" ; touch {marker} ; "', "'$(touch {marker})'",
    '"$(touch {marker})"', "\\$(touch {marker})", "\\`touch {marker}\\`", "${{IFS}}$(touch${{IFS}}{marker})",
    "$((1)) $(touch {marker})", "a\n touch {marker}", "a\r\ntouch {marker}", "a\x00touch {marker}", "> {marker}",
    ">> {marker}", "< /dev/null > {marker}", "#\n touch {marker}", "\n#SBATCH --wrap='touch {marker}'",
    "!touch {marker}", "{{touch,{marker}}}", "<(touch {marker})", "-x; touch {marker}", "--wrap=touch {marker}",
    "-touch {marker}",
    "\u2028touch {marker}", "\u2029touch {marker}", "\x85touch {marker}", "ä ö $(touch {marker})",
    "日本 `touch {marker}`", "~ $(touch {marker})", "* ? [a] $(touch {marker})", "%j %% $(touch {marker})",
    "a b\tc $(touch {marker})",
    "EOF\ntouch {marker}\nEOF", "$0 $@ $* $(touch {marker})",
]


def script_of(job):
    return with_slurm.script(job, (shipped_folder("slurm") / with_slurm.TEMPLATE).read_text())


def test_hostile_values_are_forty():
    assert len(HOSTILE) == 40


def with_value(field, value):
    if field == "name":
        return replace(JOB, name=value)
    if field == "folder":
        return replace(JOB, folder=Path("/runs") / value)
    if field == "config":
        return replace(JOB, config=Path("/configs") / value)
    if field == "override":
        return replace(JOB, overrides=(f"run.dir={value}",))
    if field == "partition":
        return replace(JOB, slurm=Slurm(partition=value))
    if field == "variable":
        return replace(JOB, variables=(("NOTE", value),))
    return replace(JOB, slurm=Slurm(image=value))


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A folder with a python that only writes down its words, and a scontrol that knows one node."""
    folder = tmp_path_factory.mktemp("bench")
    recorder = folder / "python"
    recorder.write_text(f"#!{sys.executable}\nimport os, sys\nopen({str(folder / 'words')!r}, 'wb').write("
                        "b'\\0'.join(map(os.fsencode, [*sys.argv[1:], os.environ.get('NOTE', '')])))\n")
    scontrol = folder / "scontrol"
    scontrol.write_text("#!/bin/sh\n[ \"$2\" = hostnames ] && echo n1 || echo NodeName=n1 NodeAddr=127.0.0.1\n")
    for program in (recorder, scontrol):
        program.chmod(0o755)
    return folder


@pytest.mark.parametrize("field", ["name", "folder", "config", "override", "partition", "variable", "image"])
def test_hostile_values_run_nothing(bench, tmp_path, field):
    marker = tmp_path / "ran"
    for text in HOSTILE:
        value = text.format(marker=marker)
        job = with_value(field, value)
        job = replace(job, work_dir=tmp_path, python=str(bench / "python"))
        if field == "folder":
            job = replace(job, folder=tmp_path / "runs" / value)
        if [*job.problems(), *slurm_problems(job)]:
            continue
        (bench / "words").unlink(missing_ok=True)
        script = script_of(job)
        done = subprocess.run(["bash"], input=script, text=True, capture_output=True, timeout=30, check=False,
                              env=process_environment() | {"PATH": f"{bench}:/usr/bin:/bin", "SLURM_JOB_ID": "1",
                                                           "SLURM_JOB_NODELIST": "n1", "SLURM_NNODES": "1"})
        assert not marker.exists(), value
        assert done.returncode == 0, (value, done.stderr)
        words = (bench / "words").read_bytes().decode().split("\0")
        for expected in (str(job.folder), *job.train, *(value for _, value in job.variables)):
            assert expected in words, value
    assert not marker.exists()


@pytest.mark.parametrize("field", ["name", "partition"])
def test_names_are_allow_listed(field):
    for text in HOSTILE:
        job = with_value(field, text.format(marker="x"))
        assert [*job.problems(), *slurm_problems(job)], text


def test_line_breaks_are_refused_everywhere():
    for field in ("folder", "config", "override", "variable", "image"):
        for text in ("a\nb", "a\rb", "a\x00b", "a\u2028b"):
            problems = [*with_value(field, text).problems(), *slurm_problems(with_value(field, text))]
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
    assert with_slurm.submit_argv("x", "12") == ["sbatch", "--parsable", "--dependency=afterany:12",
                                                 "--kill-on-invalid-dep=yes", "x"]


def test_torchrun_inside_has_one_task_a_node():
    script = script_of(replace(JOB, nodes=2, ranks_per_node=4, slurm=Slurm(torchrun_inside=True)))
    assert "srun --nodes=2 --ntasks=2 --ntasks-per-node=1 " in script
    assert "--nproc-per-node=4" in script


def test_torchrun():
    single = with_torchrun.argv(JOB)
    assert "--local-addr=127.0.0.1" in single
    assert "--rdzv-conf=store_type=file" in single
    assert single[-5:] == ["launchers.one_rank", "/runs/tiny", "train", "/data/tiny.yaml", "run.seed=7"]
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
