"""`trainyard submit`: checks a config and a job, then starts the job or prints what would be started."""

import argparse
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from common.errors import ConfigError, Problem, UserError
from common.shipped_files import shipped_folder
from launchers import machine_check, with_deepspeed, with_mpi, with_slurm, with_torchrun
from launchers.job import Job, Slurm, slurm_problems
from parallel.ranks.rank_info import process_environment
from pretrain.commands.jobs import cancel, remember, states, wait
from pretrain.config.run_config import load_run

# Reasons of a pending job that time alone does not cure.
NEVER_STARTS = {"PartitionConfig", "PartitionTimeLimit", "PartitionNodeLimit", "BadConstraints", "InvalidAccount",
                "InvalidQOS", "AccountNotAllowed", "QOSNotAllowed", "NonSysUser"}
LAUNCHERS = ("slurm", "deepspeed", "torchrun", "mpi")
SLURM_WORDS = ("partition", "account", "qos", "time", "constraint", "reservation", "gpus-per-node", "memory", "image",
               "mounts")
OPTIONS_OF = {
    ("slurm",): (*SLURM_WORDS, "cpus-per-task", "no-requeue", "no-node-check", "torchrun-inside", "array", "chain",
                 "template"),
    ("slurm", "mpi"): ("export",),
    ("slurm", "deepspeed"): ("exclude",),
    ("deepspeed", "mpi"): ("hostfile",),
    ("deepspeed",): ("include", "remote", "no-ssh"),
    ("deepspeed", "torchrun"): ("node-rank",),
    ("torchrun",): ("elastic", "restarts"),
}


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("submit", help="check and start a job on a cluster", allow_abbrev=False,
                                   description="Checks CONFIG and the job, then starts it; --print only shows it.")
    parser.add_argument("config", metavar="CONFIG", help="YAML file of the run")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help="settings that win over the file")
    parser.add_argument("--launcher", required=True, choices=LAUNCHERS)
    parser.add_argument("--nodes", type=int, default=1, metavar="N")
    parser.add_argument("--ranks-per-node", type=int, default=1, metavar="G", help="one for each device of a node")
    parser.add_argument("--name", help="job name (default: the name of the run folder)")
    parser.add_argument("--print", action="store_true", dest="only_print", help="show the command or script only")
    parser.add_argument("--wait", action="store_true", help="wait for the end and return the run's exit code")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="variable for the ranks")
    parser.add_argument("--export", action="append", default=[], metavar="NAME", help="variable to take along")
    parser.add_argument("--exclude", metavar="NODES", help="nodes not to use")
    parser.add_argument("--master-address", metavar="HOST", help="node of rank 0, as the others reach it")
    parser.add_argument("--master-port", type=int, metavar="PORT")
    _add_slurm(parser.add_argument_group("slurm"))
    group = parser.add_argument_group("deepspeed, torchrun, mpi")
    group.add_argument("--hostfile", type=Path, help="lines `name slots=N`")
    group.add_argument("--include", metavar="NODES", help="deepspeed: nodes and slots, such as n1@n2:0,1")
    group.add_argument("--remote", choices=with_deepspeed.REMOTE, help="deepspeed: how other nodes are reached")
    group.add_argument("--no-ssh", action="store_true", help="deepspeed: started by hand on every node")
    group.add_argument("--node-rank", type=int, metavar="K", help="number of this node, from 0")
    group.add_argument("--elastic", metavar="MIN:MAX", help="torchrun: nodes may come and go")
    group.add_argument("--restarts", type=int, default=0, help="torchrun: restarts after a failure")


def _add_slurm(group: argparse._ArgumentGroup) -> None:
    for name in SLURM_WORDS:
        group.add_argument(f"--{name}")
    group.add_argument("--cpus-per-task", type=int)
    group.add_argument("--signal-seconds", type=int, default=300, help="warning before the time limit (0: none)")
    group.add_argument("--no-requeue", action="store_true", help="do not start again after a failure or time limit")
    group.add_argument("--no-node-check", action="store_true")
    group.add_argument("--torchrun-inside", action="store_true", help="one task a node with torchrun in it")
    group.add_argument("--array", action="append", default=[], metavar="section.key=V1,V2,...",
                       help="one job for each value; several give every combination")
    group.add_argument("--template", type=Path, metavar="FILE", help="batch script to fill in (slurm/train.sbatch)")
    group.add_argument("--chain", type=int, default=1, metavar="K", help="K jobs, each after the end of the one before")


def run(args: argparse.Namespace) -> int:
    """Returns 0 once the job is started or printed, or with --wait the run's exit code."""
    job = build_job(args)
    problems = list(_problems(args, job))
    if problems:
        raise ConfigError(problems, f"submit --launcher {args.launcher}")
    if args.only_print:
        sys.stdout.write(rendered(args.launcher, job))
        return 0
    _make_folders(job)
    return _submit_to_slurm(job, args.wait) if args.launcher == "slurm" else _run_here(args.launcher, job)


def build_job(args: argparse.Namespace) -> Job:
    """The job that the arguments describe, its config checked for this number of ranks."""
    work_dir = Path.cwd()
    array = tuple(_array(args.array))
    world_size = max(args.nodes, 1) * max(args.ranks_per_node, 1)
    config = load_run(args.config, args.overrides, world_size)
    folder = (work_dir / config.run.dir).absolute()
    array = tuple(_with_folder(element, args, world_size) for element in array)
    variables = tuple(_pair(text) for text in args.env)
    slurm = Slurm(args.partition, args.account, args.qos, args.time, args.constraint, args.reservation,
                  args.gpus_per_node, args.cpus_per_task, args.memory, args.exclude, args.image, args.mounts,
                  args.signal_seconds, not args.no_requeue, args.torchrun_inside, not args.no_node_check, args.chain,
                  args.template.absolute() if args.template else None)
    return Job(
        name=args.name if args.name is not None else default_name(folder), config=Path(args.config).absolute(),
        folder=folder, work_dir=work_dir, python=sys.executable, overrides=tuple(args.overrides), nodes=args.nodes,
        ranks_per_node=args.ranks_per_node, variables=variables, exported=tuple(args.export), array=array,
        hostfile=args.hostfile.absolute() if args.hostfile else None, include=args.include,
        exclude=args.exclude if args.launcher == "deepspeed" else None, remote=args.remote, no_ssh=args.no_ssh,
        node_rank=args.node_rank, master_address=args.master_address, master_port=args.master_port,
        elastic=args.elastic, restarts=args.restarts, slurm=slurm)


def default_name(folder: Path) -> str:
    """A job name after the run folder, in the characters that every launcher takes."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", folder.name).strip("-.")[:64] or "trainyard"


def _array(words: list[str]) -> Iterator[tuple[str, ...]]:
    axes = []
    for word in words:
        key, sign, values = word.partition("=")
        if not sign or not values:
            raise UserError(f"--array {word!r}: write it as section.key=V1,V2,...")
        axes.append([f"{key}={value}" for value in values.split(",")])
    if axes:
        yield from itertools.product(*axes)


def _with_folder(element: tuple[str, ...], args: argparse.Namespace, world_size: int) -> tuple[str, ...]:
    """The overrides of one element with a run folder of its own, checked like any other run."""
    base = load_run(args.config, [*args.overrides, *element], world_size).run.dir
    name = "-".join(word.rpartition(".")[2].replace("=", "-") for word in element)
    if not all(character.isalnum() or character in "-_.+" for character in name):
        raise UserError(f"--array {' '.join(element)!r}: its values name run folders, so use letters, digits and -_.+")
    return (*element, f"run.dir={Path(base) / name}")


def _pair(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not sign:
        raise UserError(f"--env {text!r}: write it as NAME=VALUE")
    return name, value


def _problems(args: argparse.Namespace, job: Job) -> Iterator[Problem]:
    yield from job.problems()
    text = None
    if job.hostfile is not None and job.hostfile.is_file():
        text = job.hostfile.read_text(encoding="utf-8", errors="replace")
    yield from _foreign_options(args)
    if args.launcher == "slurm":
        yield from slurm_problems(job)
        yield from with_slurm.template_problems(job, _template(job), f"--template {job.slurm.template}")
    elif args.launcher == "deepspeed":
        yield from with_deepspeed.problems(job, text)
    elif args.launcher == "torchrun":
        yield from with_torchrun.problems(job)
    else:
        yield from with_mpi.problems(job, text)
    program, package = {"slurm": ("sbatch", "slurm-client"), "mpi": ("mpirun", "openmpi-bin")}.get(
        args.launcher, (None, None))
    if program and not args.only_print and shutil.which(program) is None:
        yield Problem(f"--launcher {args.launcher}", f"{program}, which is not on this machine",
                      "a login node of a cluster" if program == "sbatch" else "an MPI on this machine",
                      f"submit from a login node, or install it: apt-get install {package}")
    if not args.only_print:
        starts_here = args.launcher != "slurm" and job.remote is None
        nodes = with_mpi.slots(text) if text and job.remote != "slurm" else ()
        yield from machine_check.problems(job, _run_folders(job), nodes, starts_here)


def _foreign_options(args: argparse.Namespace) -> Iterator[Problem]:
    """Options that the chosen launcher would not hear of."""
    for launchers, names in OPTIONS_OF.items():
        for name in names if args.launcher not in launchers else ():
            value = getattr(args, name.replace("-", "_"))
            if value not in (None, False, [], 0, 1):
                yield Problem(f"--{name}", str(value), f"an option of --launcher {' or '.join(launchers)}",
                              f"leave it out with --launcher {args.launcher}")


def rendered(launcher: str, job: Job) -> str:
    """What would be started, as text for a person or a shell."""
    if launcher == "slurm":
        return with_slurm.script(job, _template(job))
    command, environ = command_here(launcher, job)
    settings = "".join(f"{name}={shlex.quote(value)} " for name, value in environ.items())
    return f"cd {shlex.quote(str(job.work_dir))} && {settings}{shlex.join(command)}\n"


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


def _template(job: Job) -> str:
    """The text of the batch script to fill in. Raises UserError when it cannot be read."""
    path = job.slurm.template or shipped_folder("slurm") / with_slurm.TEMPLATE
    try:
        with path.open(encoding="utf-8", newline="") as file:  # its line breaks as they are, for sbatch to judge
            return file.read()
    except (OSError, UnicodeError) as error:
        raise UserError(f"--template {path}: {getattr(error, 'strerror', None) or error}; "
                        "start from the template that `trainyard submit` uses without it") from None


def _make_folders(job: Job) -> None:
    for folder in {job.folder, *_run_folders(job)}:
        try:
            (folder / "logs").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"the run folder {folder} cannot be made: {error.strerror}; "
                            "choose another run.dir") from None


def _run_folders(job: Job) -> list[Path]:
    return [with_slurm.element_folder(job, element) for element in job.array] or [job.folder]


def _run_here(launcher: str, job: Job) -> int:
    command, environ = command_here(launcher, job)
    job.logs.joinpath("torchrun.rendezvous").unlink(missing_ok=True)
    # Replaces this process, so that signals meet the supervisor itself and its exit code is ours.
    sys.stdout.flush()
    os.chdir(job.work_dir)
    os.execve(command[0], command, process_environment() | environ)
    raise AssertionError("execve returned")


def _submit_to_slurm(job: Job, and_wait: bool) -> int:
    path = job.logs / "job.sbatch"
    path.write_text(with_slurm.script(job, _template(job)), encoding="utf-8", newline="")
    path.chmod(0o640)
    job_ids: list[str] = []
    for _ in range(job.slurm.chain):
        done = subprocess.run(with_slurm.submit_argv(path, job_ids[-1] if job_ids else None), capture_output=True,
                              text=True, check=False, env=_without_slurm_options())
        if done.returncode != 0:
            raise UserError(f"{done.stderr.strip()}\nsbatch refused {path}; nothing was submitted"
                            + (f" after job {job_ids[-1]}" if job_ids else "")
                            + ": `sinfo` shows partitions, nodes and limits of this cluster")
        job_ids.append(done.stdout.strip().partition(";")[0])
        _refuse_what_never_starts(job_ids)
    remember(job.folder, "slurm", job_ids)
    sys.stdout.write(f"submitted job {', '.join(job_ids)}: {path}\n"
                     f"look:   trainyard status {shlex.quote(str(job.folder))}\n"
                     f"cancel: trainyard cancel {shlex.quote(str(job.folder))}\n")
    return wait(_run_folders(job), job_ids) if and_wait else 0


def _refuse_what_never_starts(job_ids: list[str]) -> None:
    """Many clusters take what breaks their limits and let it wait for ever. Raises UserError after cancelling."""
    reasons = {entry.get("reason", "") for entry in states(job_ids[-1]) or [] if entry.get("state") == "PENDING"}
    impossible = reasons & NEVER_STARTS
    if impossible:
        for job_id in job_ids:
            cancel(job_id)
        raise UserError(f"Slurm took job {job_ids[-1]} but would never start it: {', '.join(impossible)}. It was "
                        "cancelled. `sinfo` and `scontrol show partition` show nodes and limits of this cluster")


def _without_slurm_options() -> dict[str, str]:
    """SBATCH_* variables would win over the script that was shown and checked."""
    return {name: text for name, text in process_environment().items() if not name.startswith("SBATCH_")}
