"""Checks on this machine before a job is started: run folders, ports, host names, devices."""

import socket
from collections.abc import Iterable, Iterator
from pathlib import Path

from common.errors import Problem
from launchers.job import Job
from launchers.run_folder.run_lock import RunLock
from launchers.supervise.node_check import devices_here
from parallel.ranks.rank_info import alone


def problems(job: Job, folders: Iterable[Path], nodes: Iterable[str], starts_here: bool) -> Iterator[Problem]:
    """What keeps the job from being started now.

    Args:
        folders: the run folders that the job will write.
        nodes: nodes of a hostfile, which have to have an address.
        starts_here: the ranks (of this node) are children of this machine, not of a scheduler.
    """
    if job.token is None:  # else a supervisor on another node may have begun already
        for folder in folders:
            refusal = RunLock(folder, alone()).refusal()
            if refusal:
                yield Problem("run.dir", str(folder), refusal, "wait for it, cancel it, or choose another run.dir")
    for node in nodes:
        try:
            socket.getaddrinfo(node, None)
        except OSError as error:
            yield Problem("--hostfile", node, f"a node that this machine can find ({error.strerror or error})",
                          "correct the name, or use its address")
    if starts_here:
        yield from _own_problems(job)


def _own_problems(job: Job) -> Iterator[Problem]:
    devices = devices_here()
    if devices is not None and 0 < devices < job.ranks_per_node and job.nodes == 1:
        yield Problem("--ranks-per-node", str(job.ranks_per_node), f"at most {devices}, the devices of this machine",
                      f"give --ranks-per-node {devices}")
    # Agents of an elastic job share the port, and only the first node opens it.
    if job.master_port is not None and job.elastic is None and job.node_rank in (0, None):
        error = _why_not_free(job.master_address or "127.0.0.1", job.master_port)
        if error:
            yield Problem("--master-port", str(job.master_port), f"a port that is free here ({error})",
                          "choose another one, the same on every node")


def _why_not_free(address: str, port: int) -> str | None:
    """Why rank 0 could not listen there; None also when the address is of another machine."""
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((*where[:1], 0, *where[2:]))
            except OSError:
                return None
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
            probe.listen()
    except socket.gaierror as error:
        return f"{address}: {error.strerror}"
    except OSError as error:
        return error.strerror
    return None
