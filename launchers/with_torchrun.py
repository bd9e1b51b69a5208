"""torchrun: a Job as the words of its command. Pure functions."""

from collections.abc import Iterator

from common.errors import Problem
from launchers.job import Job


def argv(job: Job) -> list[str]:
    """The command for this node. On one machine nothing listens beyond loopback; several nodes meet over c10d."""
    command = [job.python, "-m", "torch.distributed.run", f"--nproc-per-node={job.ranks_per_node}",
               f"--max-restarts={job.restarts}"]
    if job.nodes == 1 and job.elastic is None:
        # A file instead of torchrun's own store, which would listen on every interface.
        command += ["--nnodes=1", "--rdzv-backend=c10d", "--rdzv-conf=store_type=file",
                    f"--rdzv-endpoint={job.logs / 'torchrun.rendezvous'}", f"--rdzv-id={job.name}",
                    "--local-addr=127.0.0.1"]
    elif job.elastic is not None or job.restarts:
        command += [f"--nnodes={job.elastic or job.nodes}", "--rdzv-backend=c10d",
                    f"--rdzv-endpoint={job.master_address}:{job.master_port}", f"--rdzv-id={job.name}"]
    else:
        command += [f"--nnodes={job.nodes}", f"--node-rank={job.node_rank}", f"--master-addr={job.master_address}",
                    f"--master-port={job.master_port}"]
    return [*command, *job.rank_module]


def environment(job: Job) -> dict[str, str]:
    """Variables for torchrun itself: on one machine the store belongs to rank 0, which binds it to loopback."""
    return {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} if job.nodes == 1 and job.elastic is None else {}


def problems(job: Job) -> Iterator[Problem]:
    """What torchrun lacks."""
    if job.elastic is not None:
        low, _, high = job.elastic.partition(":")
        if not (low.isdigit() and high.isdigit() and 1 <= int(low) <= int(high)):
            yield Problem("--elastic", job.elastic, "MIN:MAX nodes", "for example --elastic 2:4")
    if job.nodes > 1 or job.elastic is not None:
        if job.master_address is None or job.master_port is None:
            yield Problem("--launcher torchrun", f"{job.nodes} nodes", "nodes that know where the first one is",
                          "give --master-address and --master-port, the same on every node")
        static = job.elastic is None and not job.restarts
        if static and (job.node_rank is None or not 0 <= job.node_rank < job.nodes):
            yield Problem("--node-rank", str(job.node_rank), f"0 to {job.nodes - 1}",
                          "run the command on every node, each with its own --node-rank")
