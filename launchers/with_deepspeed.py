"""The deepspeed launcher: a Job as the words of its command, and its hostfile. Pure functions."""

import re
import shlex
from collections.abc import Collection, Iterator
from pathlib import Path

from common.errors import Problem
from launchers import with_mpi
from launchers.job import Job

# With a remote shell between, the words are read by that shell; deepspeed quotes with double quotes only.
REMOTE_WORD = re.compile(r"[A-Za-z0-9_./:=,+@%-]*")
HOST_LINE = re.compile(r"([A-Za-z0-9][A-Za-z0-9_.-]*)\s+slots=(\d+)\s*(?:#.*)?")
REMOTE = ("pdsh", "openmpi", "slurm")


def argv(job: Job, known: Collection[str] = (), as_root: bool = False) -> list[str]:
    """The command on the node where deepspeed is started. ``known`` and ``as_root`` as in with_mpi."""
    command = [job.python, "-m", "deepspeed.launcher.runner"]
    if job.hostfile is not None:
        command.append(f"--hostfile={job.hostfile}")
    elif not job.no_ssh:
        # Without one, deepspeed would take /job/hostfile if that happens to exist.
        command.append("--hostfile=/dev/null")
    if job.include:
        command.append(f"--include={job.include}")
    if job.exclude:
        command.append(f"--exclude={job.exclude}")
    if _scheduler(job):
        return [*command, *_through_scheduler(job, known, as_root)]
    if not job.include and not job.exclude:
        command += [f"--num_nodes={job.nodes}", f"--num_gpus={job.ranks_per_node}"]
    if job.no_ssh:
        command += ["--no_ssh", f"--node_rank={job.node_rank}"]
    if job.nodes > 1 and job.remote and not job.no_ssh:
        command.append(f"--launcher={job.remote}")
    address = job.master_address or ("127.0.0.1" if job.nodes == 1 else None)
    if address:
        command.append(f"--master_addr={address}")
    if job.master_port:
        command.append(f"--master_port={job.master_port}")
    return [*command, "--module", *job.rank_module[1:]]


def _scheduler(job: Job) -> str | None:
    """srun or mpirun below deepspeed, which then only writes their command."""
    return job.remote if job.remote in ("openmpi", "slurm") and not job.no_ssh else None


def _through_scheduler(job: Job, known: Collection[str], as_root: bool) -> list[str]:
    """The rest of the command. deepspeed refuses --num_nodes for mpirun, and makes --num_gpus a request of GPUs."""
    if job.remote == "openmpi":
        words, rank = with_mpi.options(job, known, as_root), ["--module", *job.rank_module[1:]]
    else:
        words = [f"--nodes={job.nodes}", f"--ntasks-per-node={job.ranks_per_node}", "--kill-on-bad-exit=1",
                 "--mpi=none", "--input=none"]
        # Its Slurm runner leaves --module out and starts a script.
        rank = [str(Path(__file__).with_name("supervise") / "rank_wrapper.py"), *job.rank_module[2:]]
    # Without an address deepspeed asks the first node over ssh; these two runners do not use it.
    return ["--force_multi", "--no_ssh_check", f"--launcher={job.remote}", "--master_addr=localhost",
            f"--launcher_args={shlex.join(words)}", *rank]


def environment(job: Job) -> dict[str, str]:
    """Variables for srun and mpirun, which hand them on; deepspeed would not."""
    return with_mpi.environment(job) if _scheduler(job) else {}


def hosts(text: str) -> dict[str, int]:
    """Slots of every node in a hostfile. Raises ValueError naming the line that is not one."""
    found: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = HOST_LINE.fullmatch(line.strip())
        if not match:
            raise ValueError(f"line {number}: {line.strip()[:80]!r} is not `name slots=N`")
        if match[1] in found:
            raise ValueError(f"line {number}: {match[1]} stands there twice")
        found[match[1]] = int(match[2])
    if not found:
        raise ValueError("it names no node")
    return found


def problems(job: Job, hostfile_text: str | None) -> Iterator[Problem]:
    """What deepspeed would trip over. ``hostfile_text`` is None when there is no such file."""
    if (job.nodes > 1 or _scheduler(job)) and job.hostfile is None:
        yield Problem("--hostfile", "none", "a file with a line `name slots=N` for every node",
                      f"write one with {job.nodes} nodes and give it with --hostfile")
    if job.include and job.exclude:
        yield Problem("--include", job.include, "--include or --exclude, not both", "leave one of them out")
    if job.no_ssh and (job.node_rank is None or job.master_address is None or job.master_port is None):
        yield Problem("--no-ssh", "no --node-rank, --master-address or --master-port", "all three of them",
                      "run the command on every node, each with its own --node-rank")
    if job.remote is not None and job.remote not in REMOTE:
        yield Problem("--remote", job.remote, ", ".join(REMOTE), "choose one of them")
    if job.remote == "pdsh" and job.variables:
        yield Problem("--env", job.variables[0][0], "what deepspeed passes on over pdsh: NCCL*, PYTHON*, UCX*",
                      "write it into ~/.deepspeed_env as NAME=VALUE")
    if job.nodes > 1 and not job.no_ssh and not _scheduler(job):
        for word in (*job.rank_module, str(job.work_dir), job.python, *(text for _, text in job.variables)):
            if not REMOTE_WORD.fullmatch(word):
                yield Problem("an argument", repr(word[:100]), "letters, digits and _ . / : = , + @ % - through a "
                              "remote shell", "rename it, or use --no-ssh or --launcher slurm")
    if job.hostfile is not None:
        yield from _hostfile_problems(job, hostfile_text)


def _hostfile_problems(job: Job, text: str | None) -> Iterator[Problem]:
    where = f"--hostfile {job.hostfile}"
    if text is None:
        yield Problem(where, "a file that is not there", "a file with a line `name slots=N` for every node", "write it")
        return
    try:
        found = hosts(text)
    except ValueError as error:
        yield Problem(where, str(error), "lines `name slots=N`, each node once", "correct that line")
        return
    for option, value in (("--include", job.include), ("--exclude", job.exclude)):
        for part in (value or "").split("@"):
            name = part.partition(":")[0]
            if name and name not in found:
                yield Problem(option, name, f"a node of the hostfile: {', '.join(list(found)[:8])}", "correct the name")
    if job.include or job.exclude:
        return
    if _scheduler(job) and (len(found) != job.nodes or set(found.values()) != {job.ranks_per_node}):
        yield Problem(where, f"{len(found)} nodes with {sum(found.values())} slots",
                      f"exactly {job.nodes} nodes with {job.ranks_per_node} slots each: with --remote {job.remote} "
                      "deepspeed starts a rank for every slot", "write a hostfile of this job alone")
        return
    if job.nodes > len(found):
        yield Problem("--nodes", str(job.nodes), f"{len(found)}, the nodes of the hostfile", "ask for fewer nodes")
    for name, slots in found.items():
        if job.ranks_per_node > slots:
            yield Problem("--ranks-per-node", str(job.ranks_per_node), f"{slots} slots on {name}", "ask for fewer")
