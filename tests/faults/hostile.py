"""Rows J5 and J7: values that try to run something, and secrets of the person who submits."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from launchers.job import Job, Slurm, slurm_problems
from launchers.submission import rendered
from tests.faults.bench import INJECT, ROOT, Bench, Started, Trial, check_end, processes_of
from tests.helpers.slurm import wait_until

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
LAUNCHERS = ("slurm", "torchrun", "deepspeed", "mpi")
FIELDS = ("name", "folder", "config", "override", "partition", "variable", "image", "hostfile")


def with_value(job: Job, field: str, value: str) -> Job:
    """The job with a hostile value in one place."""
    change = {
        "name": {"name": value}, "folder": {"folder": job.folder / value},
        "config": {"config": Path("/configs") / value},
        "override": {"overrides": (f"run.dir={value}",)}, "variable": {"variables": (("NOTE", value),)},
        "partition": {"slurm": Slurm(partition=value)}, "image": {"slurm": Slurm(image=value)},
        "hostfile": {"hostfile": Path("/hosts") / value},
    }[field]
    return replace(job, **change)


def stand_ins(folder: Path) -> Path:
    """A folder with a python and an mpirun that only write down their words, and a scontrol that knows one node."""
    folder.mkdir(parents=True, exist_ok=True)
    recorder = f"#!/bin/sh\nprintf '%s\\0' \"$@\" \"$NOTE\" > '{folder}/words'\n"
    programs = {
        "python": recorder, "mpirun": recorder, "squeue": "#!/bin/sh\nexit 0\n",
        "scontrol": "#!/bin/sh\n[ \"$2\" = hostnames ] && echo n1 || echo NodeName=n1 NodeAddr=127.0.0.1\n",
    }
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


def run_hostile(launcher: str, field: str, folder: Path, values: Sequence[str] = HOSTILE) -> int:
    """Gives the values to one place of a job and runs what is rendered; returns how many were not refused.

    Raises AssertionError when a value ran something, or did not arrive as it was.
    """
    bench, marker = stand_ins(folder / "bench"), folder / "ran"
    accepted = 0
    for text in values:
        value = text.format(marker=marker)
        job = with_value(Job(name="tiny", config=Path("/data/tiny.yaml"), folder=folder / "runs", work_dir=folder,
                             python=str(bench / "python"), overrides=("run.seed=7",), ranks_per_node=2), field, value)
        if [*job.problems(), *slurm_problems(job)]:
            continue
        accepted += 1
        (bench / "words").unlink(missing_ok=True)
        done = subprocess.run(["bash"], input=rendered(launcher, job), text=True, capture_output=True, timeout=30,
                              check=False, env={"PATH": f"{bench}:/usr/bin:/bin", "SLURM_JOB_ID": "1",
                                                "SLURM_JOB_NODELIST": "n1", "SLURM_NNODES": "1"})
        assert not marker.exists(), value
        assert done.returncode == 0, (value, done.stderr)
        words = (bench / "words").read_bytes().decode().split("\0")
        for expected in (str(job.folder), *job.train, *(value for _, value in job.variables)):
            assert expected in words, (value, words)
    assert not marker.exists()
    return accepted


def hostile_values(bench: Bench, trial: Trial) -> None:
    """J5: forty values in one place of a job, for one launcher."""
    pairs = [(launcher, field) for launcher in LAUNCHERS for field in FIELDS]
    launcher, field = pairs[trial.number % len(pairs)]
    trial.facts |= {"launcher": launcher, "field": field, "values": len(HOSTILE)}
    trial.facts["not refused"] = run_hostile(launcher, field, trial.folder)


SECRETS = {"WANDB_API_KEY": "marker-secret-1a2b", "MY_PASSWORD": "marker-secret-3c4d",
           "DEPLOY_KEY": "-----BEGIN PRIVATE KEY-----\nmarker-secret-5e6f\n-----END PRIVATE KEY-----"}
J7 = ("local", "torchrun", "deepspeed", "slurm")


def secrets_stay_out(bench: Bench, trial: Trial) -> None:
    """J7: secrets in the environment of a run that crashes are in no file of the run, nor in Slurm's own."""
    launcher = J7[trial.number % len(J7)]
    trial.facts["launcher"] = launcher
    marker = trial.folder / "now"
    fault = {"FAULT_FILE": str(marker), "FAULT_RANK": "1", "FAULT_CODE": "70", "PYTHONPATH": f"{INJECT}:{ROOT}"}
    words = bench.train_words(trial.run) if launcher == "local" else bench.submit_words(trial.run, launcher)
    if launcher == "slurm":
        for name in fault.keys() - {"PYTHONPATH"}:
            words += ["--env", f"{name}={fault[name]}"]
        words += ["--wait", "--no-requeue"]
    with bench.started(trial, words, **fault, **SECRETS) as started:
        started.wait_for_step(5)
        if launcher == "slurm":
            _check_ranks_never_saw(started)
        marker.touch()
        assert started.wait(180) == 70, started.said
    check_end(trial.run, bench.reference(2))
    searched = [trial.run, started.said_path, *([bench.cluster.folder] if launcher == "slurm" else [])]
    found = subprocess.run(["grep", "-rlaE", "marker-secret", *map(str, searched)], capture_output=True, text=True,
                           check=False)
    assert found.stdout == "", found.stdout
    for name in SECRETS.keys() - {"DEPLOY_KEY"}:
        for option in (("--env", f"{name}=x"), *([("--export", name)] if launcher == "slurm" else [])):
            chosen = "torchrun" if launcher == "local" else launcher
            done = bench.trainyard(*bench.submit_words(trial.run, chosen, *option))
            assert done.returncode == 2
            assert name in done.stderr


def _check_ranks_never_saw(started: Started) -> None:
    wait_until(lambda: len(processes_of(started.run)) > 2, 60, "ranks run")
    for pid in processes_of(started.run):
        if pid != started.process.pid:
            assert b"marker-secret" not in Path(f"/proc/{pid}/environ").read_bytes(), pid
