"""Starting a Job with any launcher: what keeps it from starting, what would be started, and the start."""

import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from common.errors import Problem, UserError
from common.files import write_file, writing
from common.shipped_files import shipped_folder
from common.wording import listed
from launchers import machine_check, slurm_control, slurm_jobs, with_deepspeed, with_mpi, with_slurm, with_torchrun
from launchers.job import Job, slurm_problems
from parallel.ranks.rank_info import process_environment

LAUNCHERS = ("slurm", "deepspeed", "torchrun", "mpi")
# Reasons of a pending job that time alone does not cure.
NEVER_STARTS = {"PartitionConfig", "PartitionTimeLimit", "PartitionNodeLimit", "BadConstraints", "InvalidAccount",
                "InvalidQOS", "AccountNotAllowed", "QOSNotAllowed", "NonSysUser"}
# The program that a launcher needs on this machine, where it is found, and the package that brings it.
PROGRAMS = {"slurm": ("sbatch", "a login node of a cluster", "slurm-client"),
            "mpi": ("mpirun", "an MPI on this machine", "openmpi-bin")}


def problems(job: Job, launcher: str) -> Iterator[Problem]:
    """What the launcher would trip over, going by the job and its files alone."""
    yield from job.problems()
    if launcher == "slurm":
        yield from slurm_problems(job)
        yield from with_slurm.template_problems(job, _template(job), f"--template {job.slurm.template}")
    elif launcher == "deepspeed":
        yield from with_deepspeed.problems(job, _hostfile_text(job))
    elif launcher == "torchrun":
        yield from with_torchrun.problems(job)
    else:
        yield from with_mpi.problems(job, _hostfile_text(job))


def machine_problems(job: Job, launcher: str) -> Iterator[Problem]:
    """What keeps the job from being started from this machine now."""
    if launcher in PROGRAMS:
        program, place, package = PROGRAMS[launcher]
        if shutil.which(program) is None:
            yield Problem(f"--launcher {launcher}", f"{program}, which is not on this machine", place,
                          f"submit from a login node, or install it: apt-get install {package}")
    starts_here = launcher != "slurm" and job.remote is None
    text = _hostfile_text(job)
    nodes = with_mpi.slots(text) if text and job.remote != "slurm" else ()
    yield from machine_check.problems(job, run_folders(job), nodes, starts_here)


def rendered(launcher: str, job: Job) -> str:
    """What would be started, as text for a person or a shell."""
    if launcher == "slurm":
        return with_slurm.script(job, _template(job))
    command, environ = command_here(launcher, job)
    settings = "".join(f"{name}={shlex.quote(value)} " for name, value in environ.items())
    return f"cd {shlex.quote(str(job.work_dir))} && {settings}{shlex.join(command)}\n"


def submit(job: Job, launcher: str, wait: bool) -> int:
    """Starts a job that was found without problems.

    A launcher other than Slurm replaces this process, whose exit code is then that of the run.

    Returns: 0 once Slurm has taken the job; with `wait` the run's exit code.
    Raises:
        UserError: the run folder cannot be made, or Slurm refuses the job or would never start it.
        StorageError: the storage fails.
    """
    for folder in {job.folder, *run_folders(job)}:
        with writing(folder):
            (folder / "logs").mkdir(parents=True, exist_ok=True)
    return _submit_to_slurm(job, wait) if launcher == "slurm" else _start_here(job, launcher)


def command_here(launcher: str, job: Job) -> tuple[list[str], dict[str, str]]:
    """Command with its supervisor, and the variables to add, for a launcher that is started on this machine."""
    if launcher == "torchrun":
        command, environ = with_torchrun.argv(job), with_torchrun.environment(job)
    else:
        with_launcher = {"deepspeed": with_deepspeed, "mpi": with_mpi}[launcher]
        command = with_launcher.argv(job, process_environment(), os.geteuid() == 0)
        environ = with_launcher.environment(job)
    options = [f"--token={job.token}"] if job.token else []
    options += ["--restarts"] if job.restarts else []
    return ([job.python, "-m", "launchers.supervise.supervisor", str(job.folder), *options, "--", *command],
            {**environ, **dict(job.variables)})


def run_folders(job: Job) -> list[Path]:
    """The folders that the job writes: one, or one for each element of an array."""
    return [with_slurm.element_folder(job, element) for element in job.array] or [job.folder]


def _hostfile_text(job: Job) -> str | None:
    if job.hostfile is None or not job.hostfile.is_file():
        return None
    try:
        return job.hostfile.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"--hostfile {job.hostfile}: {error.strerror}; give a file that you may read") from None


def _template(job: Job) -> str:
    """The text of the batch script to fill in. Raises UserError when it cannot be read."""
    path = job.slurm.template or shipped_folder("slurm") / with_slurm.TEMPLATE
    try:
        with path.open(encoding="utf-8", newline="") as file:  # its line breaks as they are, for sbatch to judge
            return file.read()
    except (OSError, UnicodeError) as error:
        raise UserError(f"--template {path}: {getattr(error, 'strerror', None) or error}; "
                        "start from the template that `trainyard submit` uses without it") from None


def _start_here(job: Job, launcher: str) -> int:
    command, environ = command_here(launcher, job)
    job.logs.joinpath("torchrun.rendezvous").unlink(missing_ok=True)
    # Replaces this process, so that signals meet the supervisor itself and its exit code is ours.
    sys.stdout.flush()
    os.chdir(job.work_dir)
    os.execve(command[0], command, process_environment() | environ)
    raise AssertionError("execve returned")


def _submit_to_slurm(job: Job, wait: bool) -> int:
    script = job.logs / "job.sbatch"
    with writing(script):
        write_file(script, with_slurm.script(job, _template(job)), mode=0o640)
    job_ids: list[str] = []
    for _ in range(job.slurm.chain):
        job_ids.append(slurm_control.submit_script(script, after=job_ids[-1] if job_ids else None))
        _refuse_what_never_starts(job_ids)
    slurm_jobs.remember(job.folder, job_ids)
    sys.stdout.write(f"submitted job {listed(job_ids)}: {script}\n"
                     f"look:   trainyard status {shlex.quote(str(job.folder))}\n"
                     f"cancel: trainyard cancel {shlex.quote(str(job.folder))}\n")
    return slurm_jobs.wait(run_folders(job), job_ids) if wait else 0


def _refuse_what_never_starts(job_ids: list[str]) -> None:
    """Many clusters take what breaks their limits and let it wait for ever. Raises UserError after cancelling."""
    entries = slurm_control.queue_entries(job_ids[-1]) or []
    impossible = {entry.reason for entry in entries if entry.state == "PENDING"} & NEVER_STARTS
    if impossible:
        for job_id in job_ids:
            slurm_control.cancel(job_id)
        raise UserError(f"Slurm took job {job_ids[-1]} but would never start it: {listed(sorted(impossible))}. It was "
                        "cancelled. `sinfo` and `scontrol show partition` show nodes and limits of this cluster")
