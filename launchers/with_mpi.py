"""mpirun (Open MPI): a Job as the words of its command. Pure functions."""

from collections.abc import Collection, Iterator

from common.errors import Problem
from launchers.job import Job
from parallel.ranks.rank_info import ATTEMPT

PASSED_ON = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "OMP_NUM_THREADS", "TORCH_EXTENSIONS_DIR")


def argv(job: Job, known: Collection[str] = PASSED_ON, as_root: bool = False) -> list[str]:
    """The command. Ranks are laid out node by node, as the layout expects: tp neighbours on one node.

    ``known`` names the variables that there are; mpirun warns of others.
    """
    hostfile = [] if job.hostfile is None else ["--hostfile", str(job.hostfile)]
    return ["mpirun", "-n", str(job.world_size), *hostfile, *options(job, known, as_root), job.python, *job.rank_module]


def options(job: Job, known: Collection[str] = PASSED_ON, as_root: bool = False) -> list[str]:
    """Placement, network and variables, for mpirun itself and for deepspeed above it."""
    command = ["--map-by", f"ppr:{job.ranks_per_node}:node:OVERSUBSCRIBE", "--bind-to", "none"]
    if as_root:
        command.append("--allow-run-as-root")
    if job.nodes == 1:
        # Open MPI's own channels stay on this machine as well.
        command += ["--mca", "oob_tcp_if_include", "lo", "--mca", "btl_tcp_if_include", "lo"]
    exported = {name for name in (*PASSED_ON, *job.exported) if name in known}
    for name in sorted(exported | {name for name, _ in job.variables}):
        command += ["-x", name]
    command += ["-x", ATTEMPT]  # set by the supervisor
    if job.master_address is not None:
        command += ["-x", "MASTER_ADDR"]
    if job.master_port is not None:
        command += ["-x", "MASTER_PORT"]
    return command


def environment(job: Job) -> dict[str, str]:
    """Variables for mpirun, which hands the named ones on."""
    found = {"MASTER_ADDR": job.master_address, "MASTER_PORT": job.master_port}
    return {name: str(value) for name, value in found.items() if value is not None}


def problems(job: Job, hostfile_text: str | None) -> Iterator[Problem]:
    """What mpirun would trip over."""
    if job.nodes > 1 and job.hostfile is None:
        yield Problem("--hostfile", "none", "a file with a line `name slots=N` for every node",
                      f"write one with {job.nodes} nodes and give it with --hostfile")
    where = f"--hostfile {job.hostfile}"
    if job.hostfile is not None and hostfile_text is None:
        yield Problem(where, "a file that is not there", "a file with a line `name slots=N` for every node", "write it")
    found = slots(hostfile_text or "")
    if job.hostfile is not None and hostfile_text is not None and len(found) < job.nodes:
        yield Problem("--nodes", str(job.nodes), f"{len(found)}, the nodes of the hostfile", "ask for fewer nodes")
    for name, number in found.items():
        if number is not None and job.ranks_per_node > number:
            yield Problem("--ranks-per-node", str(job.ranks_per_node), f"{number} slots on {name}", "ask for fewer")


def slots(hostfile_text: str) -> dict[str, int | None]:
    """Nodes of a hostfile of mpirun with their slots, None where the file does not say how many."""
    lines = (line.partition("#")[0].split() for line in hostfile_text.splitlines())
    given = {words[0]: [word.partition("=")[2] for word in words[1:] if word.startswith("slots=")]
             for words in lines if words}
    return {name: int(found[0]) if found and found[0].isdigit() else None for name, found in given.items()}
