"""Slurm: a Job and a template as the text of a batch script, and the words of the commands around it. Pure functions.

The template is slurm/train.sbatch, or one of a cluster's own (`--template`). It names what is filled in with @, and
writes @@ for the character itself.
"""

import shlex
import string
from collections.abc import Iterator
from pathlib import Path

from common.errors import Problem
from launchers.job import Job

TEMPLATE = "train.sbatch"

# Explicit, because Slurm would keep the whole environment of the submitter, with its secrets.
EXPORTED = ("HOME", "USER", "LOGNAME", "PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV",
            "CONDA_PREFIX", "CUDA_HOME", "TORCH_EXTENSIONS_DIR", "OMP_NUM_THREADS")


class _Template(string.Template):
    delimiter = "@"
    idpattern = braceidpattern = "[a-z_]+"


def script(job: Job, template: str) -> str:
    """The batch script. Every value is quoted for the shell; those in #SBATCH lines are of a checked form."""
    return _Template(template).substitute(_parts(job))


def _parts(job: Job) -> dict[str, str]:
    """What a template may name; a part of several lines stands on a line of its own there."""
    return {
        "name": job.name,
        "shape": f"{job.nodes} nodes x {job.ranks_per_node} ranks",
        "options": "\n".join(f"#SBATCH {word}" for word in _options(job)),
        "work_dir": shlex.quote(str(job.work_dir)),
        "element": "\n".join(_element(job)),
        "variables": "\n".join(f"export {name}={shlex.quote(value)}" for name, value in job.variables),
        "address": "\n".join(_address(job)),
        "supervisor": _supervisor(job), "srun": _srun(job), "rank": _rank(job),
    }


def template_problems(job: Job, template: str, where: str) -> Iterator[Problem]:
    """What a template names that there is not, or leaves out although a job needs it. sbatch judges the rest."""
    parts, text = _parts(job), _Template(template)
    needed = ("options", "element", "supervisor", "srun", "rank")
    found = text.get_identifiers()
    for name in found:
        if name not in parts:
            yield Problem(where, f"@{name}", ", ".join(f"@{part}" for part in parts), "name one of them, or write @@")
    for name in needed:
        if name not in found:
            yield Problem(where, f"a script without @{name}", f"all of {', '.join(f'@{part}' for part in needed)}",
                          f"start from slurm/{TEMPLATE}")
    if not text.is_valid():
        yield Problem(where, "a single @", "@name, or @@ for the character", "write @@")


def _options(job: Job) -> list[str]:
    slurm = job.slurm
    given = {
        "job-name": job.name, "nodes": job.nodes, "ntasks": job.world_size, "ntasks-per-node": job.ranks_per_node,
        "partition": slurm.partition, "account": slurm.account, "qos": slurm.qos, "time": slurm.time,
        "constraint": slurm.constraint, "reservation": slurm.reservation, "gpus-per-node": slurm.gpus_per_node,
        "cpus-per-task": slurm.cpus_per_task, "mem": slurm.memory, "exclude": slurm.exclude,
        "array": f"0-{len(job.array) - 1}" if job.array else None,
        "signal": f"B:USR1@{slurm.signal_seconds}" if slurm.signal_seconds else None,
        "output": "/dev/null", "export": ",".join((*EXPORTED, *job.exported)),
    }
    options = [f"--{name}={value}" for name, value in given.items() if value is not None]
    # Appended: one file for all attempts of a job.
    return [*options, "--open-mode=append", "--requeue" if slurm.requeue else "--no-requeue"]


def _element(job: Job) -> list[str]:
    """Run folder and overrides; for an array those of this element."""
    if not job.array:
        return [f"folder={shlex.quote(str(job.folder))}", "overrides=()"]
    lines = ['case "$SLURM_ARRAY_TASK_ID" in']
    for index, overrides in enumerate(job.array):
        words = " ".join(shlex.quote(word) for word in overrides)
        folder = shlex.quote(str(element_folder(job, overrides)))
        lines.append(f"  {index}) folder={folder}; overrides=({words}) ;;")
    return [*lines, "  *) exit 2 ;;", "esac"]


def element_folder(job: Job, overrides: tuple[str, ...]) -> Path:
    """Run folder of one element of an array, from its run.dir override."""
    for word in reversed(overrides):
        if word.startswith("run.dir="):
            return job.work_dir / word.removeprefix("run.dir=")
    return job.folder


def _address(job: Job) -> list[str]:
    port = [] if job.master_port is None else [f"export MASTER_PORT={job.master_port}"]
    if job.master_address is not None:
        return [f"export MASTER_ADDR={shlex.quote(job.master_address)}", *port]
    # On one node the ranks meet on loopback.
    return ['[ -z "$address" ] || export MASTER_ADDR="$address"'] * (job.nodes > 1) + port


def _supervisor(job: Job) -> str:
    slurm = job.slurm
    words = ["exec", job.python, "-m", "launchers.supervise.supervisor", "--slurm"]
    if slurm.requeue and slurm.chain == 1:
        words.append("--requeue")
    if slurm.torchrun_inside:
        words.append("--ask-by-file")  # torchrun would die of the signal that srun passes on
    if slurm.node_check:
        words.append(f"--check-nodes={job.nodes}")
        words.append(f"--devices={job.ranks_per_node if slurm.gpus_per_node else 0}")
    return f'{shlex.join(words)} "$folder" --'


def _srun(job: Job) -> str:
    tasks = job.nodes if job.slurm.torchrun_inside else job.world_size
    per_node = 1 if job.slurm.torchrun_inside else job.ranks_per_node
    words = ["srun", f"--nodes={job.nodes}", f"--ntasks={tasks}", f"--ntasks-per-node={per_node}", "--export=ALL",
             "--kill-on-bad-exit=1", "--mpi=none", "--input=none"]
    if job.slurm.cpus_per_task:
        threads = job.slurm.cpus_per_task * (job.ranks_per_node if job.slurm.torchrun_inside else 1)
        words.append(f"--cpus-per-task={threads}")
    if job.slurm.image:
        words.append(f"--container-image={job.slurm.image}")
    if job.slurm.mounts:
        words.append(f"--container-mounts={job.slurm.mounts}")
    return shlex.join(words)


def _rank(job: Job) -> str:
    train = shlex.join(job.train)
    if job.slurm.torchrun_inside:
        torchrun = [job.python, "-m", "torch.distributed.run", f"--nnodes={job.nodes}",
                    f"--nproc-per-node={job.ranks_per_node}", "--rdzv-backend=c10d"]
        # The port differs from that of other jobs on the node, and is known before the agents start.
        endpoint = ('--rdzv-endpoint="${MASTER_ADDR:-$first_node}:${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 12000))}" '
                    '--rdzv-id="$SLURM_JOB_ID"')
        start = f"{shlex.join(torchrun)} {endpoint} -m launchers.supervise.rank_wrapper"
    else:
        start = shlex.join([job.python, "-m", "launchers.supervise.rank_wrapper"])
    return f'{start} "$folder" {train} "${{overrides[@]}}"'
