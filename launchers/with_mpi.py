"""mpirun (Open MPI): a Job as the words of its command. Pure functions."""

from collections.abc import Collection, Iterator

from launchers.job import Job
from pretrain.errors import Problem

PASSED_ON = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "OMP_NUM_THREADS", "TORCH_EXTENSIONS_DIR")


def argv(job: Job, known: Collection[str] = PASSED_ON, as_root: bool = False) -> list[str]:
    """The command. Ranks are laid out node by node, as the layout expects: tp neighbours on one node.

    ``known`` names the variables that there are; mpirun warns of others.
    """
    command = ["mpirun", "-n", str(job.world_size), "--map-by", f"ppr:{job.ranks_per_node}:node:OVERSUBSCRIBE",
               "--bind-to", "none"]
    if as_root:
        command.append("--allow-run-as-root")
    if job.hostfile is not None:
        command += ["--hostfile", str(job.hostfile)]
    if job.nodes == 1:
        # Open MPI's own channels stay on this machine as well.
        command += ["--mca", "oob_tcp_if_include", "lo", "--mca", "btl_tcp_if_include", "lo"]
    exported = {name for name in (*PASSED_ON, *job.exported) if name in known}
    for name in sorted(exported | {name for name, _ in job.variables}):
        command += ["-x", name]
    if job.master_address is not None:
        command += ["-x", "MASTER_ADDR"]
    if job.master_port is not None:
        command += ["-x", "MASTER_PORT"]
    return [*command, job.python, *job.rank_module]


def environment(job: Job) -> dict[str, str]:
    """Variables for mpirun, which hands the named ones on."""
    found = {"MASTER_ADDR": job.master_address, "MASTER_PORT": job.master_port}
    return {name: str(value) for name, value in found.items() if value is not None}


def problems(job: Job, hostfile_text: str | None) -> Iterator[Problem]:
    """What mpirun would trip over."""
    if job.nodes > 1 and job.hostfile is None:
        yield Problem("--hostfile", "none", "a file with a line `name slots=N` for every node",
                      f"write one with {job.nodes} nodes and give it with --hostfile")
    if job.hostfile is not None and hostfile_text is None:
        yield Problem(f"--hostfile {job.hostfile}", "a file that is not there", "a file with a line `name slots=N` for "
                      "every node", "write it")
