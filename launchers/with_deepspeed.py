"""The deepspeed launcher: a Job as the words of its command, and its hostfile. Pure functions."""

import re
from collections.abc import Iterator

from launchers.job import Job
from pretrain.errors import Problem

# With a remote shell between, the words are read by that shell; deepspeed quotes with double quotes only.
REMOTE_WORD = re.compile(r"[A-Za-z0-9_./:=,+@%-]*")
HOST_LINE = re.compile(r"([A-Za-z0-9][A-Za-z0-9_.-]*)\s+slots=(\d+)\s*(?:#.*)?")
REMOTE = ("pdsh", "openmpi", "slurm")


def argv(job: Job) -> list[str]:
    """The command on the node where deepspeed is started."""
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
    if job.nodes > 1 and job.hostfile is None:
        yield Problem("--hostfile", "none", "a file with a line `name slots=N` for every node",
                      f"write one with {job.nodes} nodes and give it with --hostfile")
    if job.include and job.exclude:
        yield Problem("--include", job.include, "--include or --exclude, not both", "leave one of them out")
    if job.no_ssh and (job.node_rank is None or job.master_address is None or job.master_port is None):
        yield Problem("--no-ssh", "no --node-rank, --master-address or --master-port", "all three of them",
                      "run the command on every node, each with its own --node-rank")
    if job.remote is not None and job.remote not in REMOTE:
        yield Problem("--remote", job.remote, ", ".join(REMOTE), "choose one of them")
    if job.nodes > 1 and not job.no_ssh:
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
    if job.nodes > len(found):
        yield Problem("--nodes", str(job.nodes), f"{len(found)}, the nodes of the hostfile", "ask for fewer nodes")
    for name, slots in found.items():
        if job.ranks_per_node > slots:
            yield Problem("--ranks-per-node", str(job.ranks_per_node), f"{slots} slots on {name}", "ask for fewer")
