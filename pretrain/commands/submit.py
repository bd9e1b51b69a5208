"""`trainyard submit`: checks a config and a job, then starts the job or prints what would be started."""

import argparse
import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from common.errors import ConfigError, ExitCode, Problem, UserError
from launchers import submission
from launchers.job import Job, Slurm
from launchers.with_deepspeed import REMOTE
from pretrain.config.run_config import load_run

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
    parser.add_argument("--launcher", required=True, choices=submission.LAUNCHERS)
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
    group.add_argument("--remote", choices=REMOTE, help="deepspeed: how other nodes are reached")
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
    """Returns 0 once the job is started or printed, or with --wait the run's exit code. Raises TrainyardError."""
    job = build_job(args)
    found = [*submission.problems(job, args.launcher), *_foreign_options(args)]
    if not args.only_print:
        found += submission.machine_problems(job, args.launcher)
    if found:
        raise ConfigError(found, f"submit --launcher {args.launcher}")
    if args.only_print:
        sys.stdout.write(submission.rendered(args.launcher, job))
        return ExitCode.DONE
    return submission.submit(job, args.launcher, args.wait)


def build_job(args: argparse.Namespace) -> Job:
    """The job that the arguments describe, its config checked for this number of ranks."""
    work_dir = Path.cwd()
    array = tuple(_array(args.array))
    world_size = max(args.nodes, 1) * max(args.ranks_per_node, 1)
    config = load_run(args.config, args.overrides, world_size)
    folder = (work_dir / config.run.dir).absolute()
    array = tuple(_with_folder(element, args, world_size) for element in array)
    slurm = Slurm(
        partition=args.partition, account=args.account, qos=args.qos, time=args.time, constraint=args.constraint,
        reservation=args.reservation, gpus_per_node=args.gpus_per_node, cpus_per_task=args.cpus_per_task,
        memory=args.memory, exclude=args.exclude, image=args.image, mounts=args.mounts,
        signal_seconds=args.signal_seconds, requeue=not args.no_requeue, torchrun_inside=args.torchrun_inside,
        node_check=not args.no_node_check, chain=args.chain,
        template=args.template.absolute() if args.template else None)
    return Job(
        name=args.name if args.name is not None else default_name(folder), config=Path(args.config).absolute(),
        folder=folder, work_dir=work_dir, python=sys.executable, overrides=tuple(args.overrides), nodes=args.nodes,
        ranks_per_node=args.ranks_per_node, variables=tuple(_pair(text) for text in args.env),
        exported=tuple(args.export), array=array, hostfile=args.hostfile.absolute() if args.hostfile else None,
        include=args.include, exclude=args.exclude if args.launcher == "deepspeed" else None, remote=args.remote,
        no_ssh=args.no_ssh, node_rank=args.node_rank, master_address=args.master_address,
        master_port=args.master_port, elastic=args.elastic, restarts=args.restarts, slurm=slurm)


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


def _foreign_options(args: argparse.Namespace) -> Iterator[Problem]:
    """Options that the chosen launcher does not have."""
    for launchers, names in OPTIONS_OF.items():
        for name in names if args.launcher not in launchers else ():
            value = getattr(args, name.replace("-", "_"))
            if value not in (None, False, [], 0, 1):
                yield Problem(f"--{name}", str(value), f"an option of --launcher {' or '.join(launchers)}",
                              f"leave it out with --launcher {args.launcher}")
