"""Rank information of this process: the only file that reads the rank environment variables of launchers.

Several launchers can be nested (torchrun inside srun inside sbatch); the innermost one decides. A launcher that
marks its children (this project's own, torchrun, deepspeed, Open MPI, Hydra) wins over the Slurm step around it;
variables without such a mark must agree with the step, or the start is refused.
"""

import os
import socket
import zlib
from collections.abc import Mapping, MutableMapping
from dataclasses import KW_ONLY, dataclass, replace

from common.errors import RankInfoError
from parallel.ranks.slurm_node_list import NodeListError, expand_node_list, expand_tasks_per_node

STORE_FD = "TRAINYARD_STORE_FD"
LAUNCHER = "TRAINYARD_LAUNCHER"
ATTEMPT = "TRAINYARD_ATTEMPT"
SUPERVISOR = "TRAINYARD_SUPERVISOR"
LOOPBACK = "127.0.0.1"
# Below the ephemeral range of Linux (32768-), where an outgoing connection could take the port first.
FIRST_PORT, NUM_PORTS, PORT_STRIDE, NUM_CANDIDATES = 20_000, 12_000, 1_009, 8


@dataclass(frozen=True)
class RankInfo:
    """This process among all ranks of the run.

    ``source`` is local, torchrun, deepspeed, environment, slurm, openmpi or hydra. ``master_address`` is None only
    under MPI on several nodes, where the ranks have to exchange it. ``port_is_fixed`` tells a port that a person or
    launcher chose from one derived from the job id, which may move on to the next of ``ports`` when it is busy.
    ``attempt`` counts from 1.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    _: KW_ONLY
    master_address: str | None
    master_port: int
    source: str
    node: str
    nodes: tuple[str, ...] = ()
    store_fd: int | None = None
    job_id: str | None = None
    attempt: int = 1
    port_is_fixed: bool = False
    store_is_hosted: bool = False
    attempt_token: str | None = None  # names the attempt among others that may touch the same run folder
    end_unix_seconds: float | None = None  # when the job's time is over, where that is known

    @property
    def ports(self) -> tuple[int, ...]:
        """The ports to try, in the order on which all ranks agree."""
        if self.port_is_fixed:
            return (self.master_port,)
        offset = self.master_port - FIRST_PORT
        return tuple(FIRST_PORT + (offset + k * PORT_STRIDE) % NUM_PORTS for k in range(NUM_CANDIDATES))

    @property
    def one_machine(self) -> bool:
        """True when every rank runs on this node."""
        return self.local_world_size == self.world_size

    def export(self, environ: MutableMapping[str, str] | None = None) -> None:
        """Writes the variables that libraries read: RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT ...

        On one machine also the network interface, loopback, unless one is named. Default: this process's environment.
        """
        environ = os.environ if environ is None else environ
        environ["RANK"] = str(self.rank)
        environ["LOCAL_RANK"] = str(self.local_rank)
        environ["WORLD_SIZE"] = str(self.world_size)
        environ["LOCAL_WORLD_SIZE"] = str(self.local_world_size)
        environ["MASTER_ADDR"] = self.master_address or LOOPBACK
        environ["MASTER_PORT"] = str(self.master_port)
        if self.one_machine:
            for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
                environ.setdefault(name, loopback_interface())


def loopback_interface() -> str:
    """Name of the loopback interface: lo on Linux, lo0 on macOS and the BSDs."""
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in ("lo", "lo0") if name in names), "lo")


def alone() -> RankInfo:
    """The only rank of a run that no launcher started."""
    return RankInfo(0, 1, 0, 1, master_address=LOOPBACK, master_port=FIRST_PORT, source="local",
                    node=socket.gethostname())


def process_environment() -> dict[str, str]:
    """A copy of this process's environment, for those who start children."""
    return dict(os.environ)


def read_rank_info(environ: Mapping[str, str] | None = None) -> RankInfo | None:
    """Rank information of this process, or None when no launcher started it.

    Raises RankInfoError when variables are half set, not numbers, out of range or disagree with each other.
    """
    values = {name: text for name, text in (os.environ if environ is None else environ).items() if text != ""}
    native = _hydra(values) or _openmpi(values) or _slurm(values)
    exported = _exported(values, native)
    info = exported or native or _pmi(values)
    if info is None:
        return None
    _check_range(info)
    job_id, restarts = _job(values)
    port = _number(values, "MASTER_PORT")
    if port is None:
        # The same on all ranks, and different for two jobs that share a node.
        port, fixed = FIRST_PORT + zlib.crc32(_port_seed(values).encode()) % NUM_PORTS, False
    else:
        fixed = True
    if not 0 < port < 65536:
        raise RankInfoError(f"MASTER_PORT={port} is not a port number (1-65535)")
    address = values.get("MASTER_ADDR", info.master_address)
    if address is None and info.one_machine:
        address = LOOPBACK
    return replace(info, master_address=address, master_port=port, port_is_fixed=fixed, job_id=job_id,
                   attempt=1 + restarts, store_fd=_number(values, STORE_FD) if info.rank == 0 else None,
                   nodes=info.nodes or _nodes(values, info.node), attempt_token=values.get(ATTEMPT),
                   end_unix_seconds=_end(values))


def _exported(values: Mapping[str, str], native: RankInfo | None) -> RankInfo | None:
    """RANK, WORLD_SIZE, LOCAL_RANK: from this project, torchrun, deepspeed or a script."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    numbers = {name: _number(values, name) for name in names}
    given = {name: number for name, number in numbers.items() if number is not None}
    if not given:
        return None
    source = _exporting_launcher(values)
    if native is not None and source == "environment":
        _check_agreement(given, native)
        return None
    if len(given) < len(names):
        lacking = [name for name in names if name not in given]
        raise RankInfoError(
            f"rank variables are half set: {_pairs(given)} without {', '.join(lacking)}; "
            "set all of RANK, WORLD_SIZE and LOCAL_RANK or none of them"
        )
    if given["WORLD_SIZE"] > 1 and not ("MASTER_ADDR" in values and "MASTER_PORT" in values):
        raise RankInfoError(
            f"rank variables are half set: {_pairs(given)} without MASTER_ADDR and MASTER_PORT; "
            "set both to the address of rank 0 and a free port there"
        )
    local_world_size = _first_number(values, "LOCAL_WORLD_SIZE", "LOCAL_SIZE")
    if local_world_size is None:
        local_world_size = 1 if given["WORLD_SIZE"] == 1 else given["LOCAL_RANK"] + 1
    return RankInfo(given["RANK"], given["WORLD_SIZE"], given["LOCAL_RANK"], local_world_size, master_address=None,
                    master_port=FIRST_PORT, source=source, node=_node(values),
                    store_is_hosted=values.get("TORCHELASTIC_USE_AGENT_STORE") == "True")


def _exporting_launcher(values: Mapping[str, str]) -> str:
    if LAUNCHER in values:
        return "local"
    if "TORCHELASTIC_RUN_ID" in values:
        return "torchrun"
    # deepspeed/launcher/launch.py sets these two for its children and for nobody else.
    return "deepspeed" if "CROSS_RANK" in values and "CROSS_SIZE" in values else "environment"


def _check_agreement(given: Mapping[str, int], native: RankInfo) -> None:
    """Variables that a job script exported must say what the launcher says."""
    theirs = {"RANK": native.rank, "WORLD_SIZE": native.world_size, "LOCAL_RANK": native.local_rank}
    wrong = {name: number for name, number in given.items() if number != theirs[name]}
    if wrong:
        launcher = {name: theirs[name] for name in wrong}
        raise RankInfoError(
            f"rank variables disagree: the environment says {_pairs(wrong)}, {native.source} says {_pairs(launcher)}; "
            f"unset {', '.join(wrong)} in the job script, or start the ranks with torchrun if they were meant"
        )


def _slurm(values: Mapping[str, str]) -> RankInfo | None:
    """A task of an srun step. The batch script also has SLURM_PROCID=0, but is no rank: it has no step id."""
    if "SLURM_STEP_ID" not in values and "SLURM_STEPID" not in values:
        return None
    rank, local_rank = _number(values, "SLURM_PROCID"), _number(values, "SLURM_LOCALID")
    world_size = _first_number(values, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS")
    if rank is None and local_rank is None:
        return None
    if rank is None or world_size is None or local_rank is None:
        raise RankInfoError(
            "Slurm variables are half set: a step needs SLURM_PROCID, SLURM_LOCALID and SLURM_STEP_NUM_TASKS "
            "(or SLURM_NTASKS); start the ranks with srun and do not unset its variables"
        )
    nodes = _slurm_nodes(values)
    per_node = values.get("SLURM_STEP_TASKS_PER_NODE") or values.get("SLURM_TASKS_PER_NODE")
    node_index = _number(values, "SLURM_NODEID") or 0
    try:
        counts = expand_tasks_per_node(per_node) if per_node else []
    except NodeListError as error:
        raise RankInfoError(f"SLURM_STEP_TASKS_PER_NODE: {error}") from None
    local_world_size = counts[node_index] if node_index < len(counts) else (world_size if len(nodes) <= 1 else 1)
    address = LOOPBACK if len(nodes) <= 1 else nodes[0]
    return RankInfo(rank, world_size, local_rank, local_world_size, master_address=address, master_port=FIRST_PORT,
                    source="slurm", node=_node(values), nodes=nodes)


def _openmpi(values: Mapping[str, str]) -> RankInfo | None:
    return _mpi(values, "openmpi", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
                "OMPI_COMM_WORLD_LOCAL_SIZE")


def _hydra(values: Mapping[str, str]) -> RankInfo | None:
    """Hydra (MPICH, Intel MPI) marks its children with MPI_LOCALRANKID."""
    if "MPI_LOCALRANKID" not in values:
        return None
    return _mpi(values, "hydra", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")


def _pmi(values: Mapping[str, str]) -> RankInfo | None:
    if "PMI_RANK" not in values and "PMI_SIZE" not in values:
        return None
    raise RankInfoError(
        f"rank variables are half set: PMI_RANK={values.get('PMI_RANK', '(unset)')} and "
        f"PMI_SIZE={values.get('PMI_SIZE', '(unset)')} without MPI_LOCALRANKID and MPI_LOCALNRANKS; "
        "start the ranks with mpirun, mpiexec or srun"
    )


def _mpi(values: Mapping[str, str], source: str, *names: str) -> RankInfo | None:
    numbers = [_number(values, name) for name in names]
    if all(number is None for number in numbers):
        return None
    lacking = [name for name, number in zip(names, numbers, strict=True) if number is None]
    if lacking:
        present = {name: number for name, number in zip(names, numbers, strict=True) if number is not None}
        raise RankInfoError(
            f"rank variables are half set: {_pairs(present)} without {', '.join(lacking)}; start the ranks with mpirun"
        )
    rank, world_size, local_rank, local_world_size = (number for number in numbers if number is not None)
    return RankInfo(rank, world_size, local_rank, local_world_size, master_address=None, master_port=FIRST_PORT,
                    source=source, node=_node(values))


def _job(values: Mapping[str, str]) -> tuple[str | None, int]:
    """Job id (array tasks as 12_3) and how often the job was started again."""
    job_id = values.get("SLURM_JOB_ID")
    if job_id and "SLURM_ARRAY_JOB_ID" in values and "SLURM_ARRAY_TASK_ID" in values:
        job_id = f"{values['SLURM_ARRAY_JOB_ID']}_{values['SLURM_ARRAY_TASK_ID']}"
    if job_id is None and values.get("TORCHELASTIC_RUN_ID", "none") != "none":
        job_id = values["TORCHELASTIC_RUN_ID"]
    restarts = (_number(values, "SLURM_RESTART_COUNT") or 0) + (_number(values, "TORCHELASTIC_RESTART_COUNT") or 0)
    return job_id, restarts


def _end(values: Mapping[str, str]) -> float | None:
    """Slurm 23 and newer say when the job ends, and for older ones the job script does."""
    text = values.get("SLURM_JOB_END_TIME", "")
    return float(text) if text.isascii() and text.isdigit() else None


def _port_seed(values: Mapping[str, str]) -> str:
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid")
    return " ".join(values.get(name, "") for name in names)


def _slurm_nodes(values: Mapping[str, str]) -> tuple[str, ...]:
    for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"):
        if name in values:
            try:
                return tuple(expand_node_list(values[name]))
            except NodeListError as error:
                raise RankInfoError(f"{name}: {error}") from None
    return ()


def _nodes(values: Mapping[str, str], node: str) -> tuple[str, ...]:
    return _slurm_nodes(values) or (node,)


def _node(values: Mapping[str, str]) -> str:
    return values.get("SLURMD_NODENAME") or socket.gethostname()


def _check_range(info: RankInfo) -> None:
    if info.world_size < 1 or info.rank >= info.world_size or info.local_rank >= info.local_world_size:
        raise RankInfoError(
            f"rank variables are out of range: rank {info.rank} of {info.world_size}, local rank {info.local_rank} of "
            f"{info.local_world_size} ({info.source}); a rank counts from 0 and is smaller than the number of ranks"
        )


def _first_number(values: Mapping[str, str], *names: str) -> int | None:
    return next((_number(values, name) for name in names if name in values), None)


def _number(values: Mapping[str, str], name: str) -> int | None:
    text = values.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit()) or len(text) > 9:
        raise RankInfoError(f"{name}={text[:40]!r} is not a whole number from 0")
    return int(text)


def _pairs(numbers: Mapping[str, int]) -> str:
    return " ".join(f"{name}={number}" for name, number in numbers.items())
