"""How ranks find each other and leave: one store, bound to one chosen address, and every wait with a limit.

Rank 0 hosts the store on a listening socket of its own (torch alone would listen on every interface). Where the port
was only derived from the job id it may be taken, so rank 0 holds the first free one of an agreed row of ports and
answers there with a line that names the job; the others ask along that row until they meet it. Under a launcher that
hosts the store itself (torchrun) or chose the port, that store or port is used.
"""

import contextlib
import ipaddress
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

from common.errors import RendezvousError
from parallel.ranks.rank_info import LOOPBACK, RankInfo

if TYPE_CHECKING:
    import torch

ANSWER_SECONDS, PAUSE_SECONDS = 3.0, 0.5
PARTING_SECONDS, FAILED_PARTING_SECONDS = 300.0, 3.0
MAX_NAMED = 16


def join(info: RankInfo, timeout_seconds: float = 600.0, collective_timeout_seconds: float = 1800.0,
         exports: bool = True) -> None:
    """Initialises torch.distributed for this rank: gloo on CPU, and NCCL beside it where there is a GPU.

    Blocks until all ranks are there, at most ``timeout_seconds``; every later collective is limited to
    ``collective_timeout_seconds``. ``exports``: also sets RANK, MASTER_ADDR ... of this process, which DeepSpeed reads.
    Raises RendezvousError.
    """
    import torch
    import torch.distributed as dist

    deadline = time.monotonic() + timeout_seconds
    info = _with_address(info)
    store, port = _open_store(info, deadline)
    if exports:
        replace(info, master_port=port).export()
    if info.world_size > 1:
        _wait_for_all(info, store, deadline)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=info.rank, world_size=info.world_size,
                            timeout=timedelta(seconds=collective_timeout_seconds))


def leave(failed: bool | None = None) -> None:
    """Leaves in order: no rank closes a connection that another rank still needs, and the host of the store is last.

    With ``failed`` (default: an exception is on its way) peers may be dead, so the others are waited for only briefly.
    Does nothing when join did not succeed.
    """
    import torch.distributed as dist

    if not dist.is_initialized():
        return
    failed = sys.exc_info()[0] is not None if failed is None else failed
    if dist.get_world_size() > 1:
        # The store may be gone with its host, or somebody may not come: both are an end, not an error.
        with contextlib.suppress(RuntimeError):
            _part(dist.distributed_c10d._get_default_store(), dist.get_rank(), dist.get_world_size(),
                  FAILED_PARTING_SECONDS if failed else PARTING_SECONDS)
    if failed and "nccl" in dist.get_backend_config():
        dist.distributed_c10d._abort_process_group()  # destroy would wait for collectives that cannot end
    else:
        dist.destroy_process_group()


def _part(store: "torch.distributed.Store", rank: int, world_size: int, seconds: float) -> None:
    limit = timedelta(seconds=seconds)
    if store.add("trainyard/left", 1) == world_size:
        store.set("trainyard/all-left", "1")
    store.wait(["trainyard/all-left"], limit)
    if store.add("trainyard/gone", 1) == world_size:
        store.set("trainyard/all-gone", "1")
    if rank == 0:
        store.wait(["trainyard/all-gone"], limit)


def _with_address(info: RankInfo) -> RankInfo:
    """Under MPI on several nodes nobody has said where rank 0 is: MPI itself tells the others."""
    if info.master_address is not None:
        return info
    try:
        from mpi4py import MPI
    except ImportError:
        raise RendezvousError(
            f"rank {info.rank} on {info.node}: {info.source} does not say on which node rank 0 is, and mpi4py is not "
            "installed; install it, or start with mpirun -x MASTER_ADDR=<node of rank 0> -x MASTER_PORT=<free port>",
            is_mistake=True) from None
    return replace(info, master_address=MPI.COMM_WORLD.bcast(info.node, root=0))


def _open_store(info: RankInfo, deadline: float) -> tuple["torch.distributed.Store", int]:
    """The store of this run and its port, seen from this rank."""
    import torch.distributed as dist

    if info.world_size == 1:
        return dist.HashStore(), info.master_port
    address = info.master_address or LOOPBACK
    if info.store_is_hosted:
        store = _client(address, info.master_port, info, deadline)
        # One store serves all attempts of an elastic run, so each gets its own part of it.
        return dist.PrefixStore(f"trainyard/attempt{info.attempt}", store), info.master_port
    if info.rank > 0:
        host, port = (address, info.master_port) if info.port_is_fixed else _ask_for_store(info, deadline)
        return _client(host, port, info, deadline), port
    if info.store_fd is not None:
        return _host(socket.socket(fileno=info.store_fd), info, deadline)
    if info.port_is_fixed:
        return _host(_listen(info, info.ports), info, deadline)
    beacon = _listen(info, info.ports)
    listener = _listen(info, (0,))
    _answer_until_closed(beacon, f"{_token(info)} {listener.getsockname()[1]}\n".encode())
    try:
        store, port = _host(listener, info, deadline)
        _wait_for_all(info, store, deadline)
    finally:
        beacon.close()
    return store, port


def _host(listener: socket.socket, info: RankInfo, deadline: float) -> tuple["torch.distributed.Store", int]:
    import torch.distributed as dist

    host, port = listener.getsockname()[:2]
    store = dist.TCPStore(host, port, info.world_size, is_master=True, timeout=_left(deadline), wait_for_workers=False,
                          master_listen_fd=listener.detach())
    return store, port


def _client(host: str, port: int, info: RankInfo, deadline: float) -> "torch.distributed.Store":
    """Connects to a store that may not be up yet."""
    import torch.distributed as dist

    while True:
        # torch itself waits without a limit for a name or port that does not answer, so ask first.
        why = _connect_problem(host, port)
        if why is None:
            return dist.TCPStore(host, port, info.world_size, timeout=_left(deadline), wait_for_workers=False)
        if time.monotonic() > deadline:
            raise RendezvousError(_not_found(info, f"{host} port {port}", why))
        time.sleep(PAUSE_SECONDS)


def _connect_problem(host: str, port: int) -> str | None:
    try:
        socket.create_connection((host, port), timeout=ANSWER_SECONDS).close()
    except OSError as error:
        return str(error)
    return None


def _listen(info: RankInfo, ports: tuple[int, ...]) -> socket.socket:
    """Rank 0's socket on the master address and the first free port."""
    host = _own_address(info)
    problems = []
    for port in ports:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
            listener.listen(max(128, info.world_size))
        except OSError as error:
            listener.close()
            problems.append(f"port {port}: {error.strerror}")
        else:
            return listener
    raise RendezvousError(
        f"rank 0 on {info.node} cannot listen on {info.master_address} ({host}): {'; '.join(problems)}; "
        "choose a free port with MASTER_PORT (or the launcher's own option), and an address of the node of rank 0",
        is_mistake=True)


def _own_address(info: RankInfo) -> str:
    """Numeric address of the master on its own node, never 'any'."""
    try:
        found = [str(entry[4][0]) for entry in socket.getaddrinfo(info.master_address, None, type=socket.SOCK_STREAM)]
    except OSError as error:
        raise RendezvousError(
            f"rank {info.rank} on {info.node}: the name {info.master_address!r} of rank 0's node has no address "
            f"({error}); set MASTER_ADDR to a name or address that all nodes can reach", is_mistake=True) from None
    addresses = [ipaddress.ip_address(text.partition("%")[0]) for text in found]
    if any(address.is_unspecified for address in addresses):
        raise RendezvousError(f"MASTER_ADDR={info.master_address} means every interface; name one address of the node",
                              is_mistake=True)
    if all(address.is_loopback for address in addresses) and not info.one_machine:
        # Debian gives a machine's own name 127.0.1.1, where nobody else can reach it.
        return _address_towards([node for node in info.nodes if node != info.node]) or str(addresses[0])
    return str(addresses[0])


def _address_towards(nodes: list[str]) -> str | None:
    """This node's address as seen on the way to another one; nothing is sent."""
    for node in nodes[:1]:
        with contextlib.suppress(OSError):
            family, kind, protocol, _, address = socket.getaddrinfo(node, 9, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(address)
                return str(probe.getsockname()[0])
    return None


def _token(info: RankInfo) -> str:
    job = (info.job_id or "-").replace(" ", "_")
    return f"trainyard {job} {info.attempt} {info.world_size} {info.master_port}"


def _answer_until_closed(beacon: socket.socket, line: bytes) -> None:
    """Tells everyone who connects which job is here and where its store is, in a thread, until the socket closes."""
    beacon.settimeout(PAUSE_SECONDS)

    def answer() -> None:
        while beacon.fileno() >= 0:
            with contextlib.suppress(OSError):  # nobody came for a moment, or a caller hung up
                connection, _ = beacon.accept()
                with connection:
                    connection.settimeout(ANSWER_SECONDS)
                    connection.sendall(line)

    threading.Thread(target=answer, name="rendezvous", daemon=True).start()


def _ask_for_store(info: RankInfo, deadline: float) -> tuple[str, int]:
    """Host and port of the store, from whoever answers for this job on one of the agreed ports."""
    problems: dict[int, str] = {}
    while True:
        for port in info.ports:
            try:
                with socket.create_connection((info.master_address, port), timeout=ANSWER_SECONDS) as connection:
                    connection.settimeout(ANSWER_SECONDS)
                    line = connection.makefile("r", encoding="ascii", errors="replace").readline(400).strip()
                    host = connection.getpeername()[0]
            except OSError as error:
                problems[port] = str(error)
                continue
            token, _, store_port = line.rpartition(" ")
            if token == _token(info) and store_port.isdigit():
                return host, int(store_port)
            problems[port] = "another program answers"
        if time.monotonic() > deadline:
            ports = ", ".join(str(port) for port in info.ports)
            raise RendezvousError(_not_found(info, f"{info.master_address} ports {ports}", _common(problems)))
        time.sleep(PAUSE_SECONDS)


def _common(problems: dict[int, str]) -> str:
    return "; ".join(sorted(set(problems.values())))


def _not_found(info: RankInfo, where: str, why: str) -> str:
    addresses = "no address"
    with contextlib.suppress(OSError):
        entries = socket.getaddrinfo(info.master_address, None, type=socket.SOCK_STREAM)
        addresses = ", ".join(sorted({str(entry[4][0]) for entry in entries}))
    return (f"rank {info.rank} on {info.node} did not find rank 0 at {where} ({addresses}): {why}; "
            "look whether rank 0 started, whether the name is right on this node, and whether a firewall is between")


def _wait_for_all(info: RankInfo, store: "torch.distributed.Store", deadline: float) -> None:
    """Returns when every rank has been here; else the error names who has not."""
    with _named_problems(info, store):
        if not store.check([f"trainyard/here/{info.rank}"]):
            store.set(f"trainyard/here/{info.rank}", info.node)
            if store.add("trainyard/joined", 1) == info.world_size:
                store.set("trainyard/all-here", "1")
        store.wait(["trainyard/all-here"], _left(deadline))


@contextlib.contextmanager
def _named_problems(info: RankInfo, store: "torch.distributed.Store") -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        try:
            missing = [rank for rank in range(info.world_size) if not store.check([f"trainyard/here/{rank}"])]
            silent = _silent_node(info, store, missing)
        except RuntimeError:
            raise RendezvousError(f"rank {info.rank} on {info.node}: rank 0 went away before all ranks had "
                                  f"joined ({error}); its log says why") from None
        shown = ", ".join(str(rank) for rank in missing[:MAX_NAMED]) + (" ..." if len(missing) > MAX_NAMED else "")
        raise RendezvousError(
            f"rank {info.rank} on {info.node}: {len(missing)} of {info.world_size} ranks did not join in time: "
            f"{shown}; their logs say why, or their node does not answer", node=silent) from None


def _silent_node(info: RankInfo, store: "torch.distributed.Store", missing: list[int]) -> str | None:
    """The node from which no rank came, when it is the only one and all the others are complete."""
    came = {store.get(f"trainyard/here/{rank}").decode() for rank in range(info.world_size) if rank not in missing}
    silent = [node for node in info.nodes if node not in came]
    complete = len(missing) * len(info.nodes) == info.world_size
    return silent[0] if len(silent) == 1 and complete else None


def _left(deadline: float) -> timedelta:
    return timedelta(seconds=max(1.0, deadline - time.monotonic()))
