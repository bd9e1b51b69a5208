"""A Job, the same for every launcher: its fields, its checks, and the command of one rank."""

import re
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path

from common.errors import Problem

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
LIST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,-]{0,199}")
NODES = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,\[\]-]{0,999}")
CONSTRAINT = re.compile(r"[A-Za-z0-9_(\[][A-Za-z0-9_.,&|*()\[\]-]{0,199}")
TIME = re.compile(r"(\d+-)?\d{1,6}(:[0-5]?\d){0,2}")
GRES = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_:.,-]{0,199}")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}")
# A variable of this name would be written into a script or a scheduler's records.
SECRET = re.compile(r"(?i)token|secret|passw|passphrase|credential|api_?key|private_?key|access_?key")
CONTROL = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029]")


@dataclass(frozen=True)
class Slurm:
    """Options of Slurm alone; None leaves one to the cluster's default."""

    _: KW_ONLY
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str | None = None
    constraint: str | None = None
    reservation: str | None = None
    gpus_per_node: str | None = None
    cpus_per_task: int | None = None
    memory: str | None = None
    exclude: str | None = None
    image: str | None = None
    mounts: str | None = None
    signal_seconds: int = 300
    requeue: bool = True
    torchrun_inside: bool = False
    node_check: bool = True
    chain: int = 1
    template: Path | None = None


@dataclass(frozen=True)
class Job:
    """One job. ``overrides`` go to `trainyard train`; ``array`` holds further overrides for each element of an array.

    ``variables`` are set for the ranks, ``exported`` names those taken over from the environment of the submitter.
    """

    name: str
    _: KW_ONLY
    config: Path
    folder: Path
    work_dir: Path
    python: str
    overrides: tuple[str, ...] = ()
    nodes: int = 1
    ranks_per_node: int = 1
    variables: tuple[tuple[str, str], ...] = ()
    exported: tuple[str, ...] = ()
    array: tuple[tuple[str, ...], ...] = ()
    hostfile: Path | None = None
    include: str | None = None
    exclude: str | None = None
    remote: str | None = None  # deepspeed --launcher: pdsh, openmpi, slurm
    no_ssh: bool = False
    node_rank: int | None = None
    master_address: str | None = None
    master_port: int | None = None
    elastic: str | None = None  # torchrun: min:max nodes
    restarts: int = 0
    slurm: Slurm = field(default_factory=Slurm)

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def token(self) -> str | None:
        """Name of the attempt where the job is started on every node, each with its own supervisor; else None."""
        is_per_node = self.no_ssh or self.node_rank is not None or self.elastic is not None
        return f"{self.name}@{self.master_address}:{self.master_port}" if is_per_node else None

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    @property
    def train(self) -> tuple[str, ...]:
        """Arguments of `python -m pretrain`."""
        return ("train", str(self.config), *self.overrides)

    @property
    def rank_module(self) -> tuple[str, ...]:
        """Arguments of python for one rank: its wrapper, which writes its log and its exit code."""
        return ("-m", "launchers.supervise.rank_wrapper", str(self.folder), *self.train)

    def problems(self) -> Iterator[Problem]:
        """Values that could not be written safely into a command or a script, whatever the launcher."""
        yield from self._problems_of_words()
        for number, where in ((self.nodes, "--nodes"), (self.ranks_per_node, "--ranks-per-node")):
            if not 1 <= number <= 100_000:
                yield Problem(where, str(number), "1 to 100000", f"give {where} a number from 1")
        for name, text in self.variables:
            yield from _checked("--env", name, VARIABLE, "a variable's name")
            yield from _plain("--env", text)
            if SECRET.search(name):
                yield Problem("--env", name, "values that everybody on the cluster may read",
                              "read the secret from a file of mode 0600 on the node instead")
        for name in self.exported:
            yield from _checked("--export", name, VARIABLE, "a variable's name")
            if SECRET.search(name):
                yield Problem("--export", name, "values that a scheduler may keep and show",
                              "read the secret from a file of mode 0600 on the node instead")

    def _problems_of_words(self) -> Iterator[Problem]:
        yield from _checked("--name", self.name, NAME, "letters, digits, _ . - (at most 64, no leading dash)")
        for where, value in (("CONFIG", str(self.config)), ("run.dir", str(self.folder)), ("--python", self.python),
                             ("the working directory", str(self.work_dir)), ("--hostfile", str(self.hostfile or "")),
                             ("--template", str(self.slurm.template or "")),
                             *(("an override", word) for word in self.overrides),
                             *(("--array", word) for element in self.array for word in element)):
            yield from _plain(where, value)
        for where, nodes in (("--include", self.include), ("--exclude", self.exclude)):
            if nodes is not None:
                yield from _checked(where, nodes, re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,@:\[\]-]{0,999}"),
                                    "a list of nodes such as n1@n2:0,1")
        if self.master_address is not None:
            yield from _checked("--master-address", self.master_address, re.compile(r"[A-Za-z0-9:][A-Za-z0-9_.:%-]*"),
                                "a host name or an address")
        if self.master_port is not None and not 0 < self.master_port < 65536:
            yield Problem("--master-port", str(self.master_port), "1 to 65535", "choose a free port")


def slurm_problems(job: Job) -> Iterator[Problem]:
    """Values that sbatch would refuse, or misread."""
    slurm = job.slurm
    for where, value, pattern, possible in (
        ("--partition", slurm.partition, LIST, "a partition's name, or several with commas"),
        ("--account", slurm.account, NAME, "an account's name"),
        ("--qos", slurm.qos, NAME, "the name of a quality of service"),
        ("--reservation", slurm.reservation, LIST, "a reservation's name"),
        ("--constraint", slurm.constraint, CONSTRAINT, "features with & | and counts"),
        ("--time", slurm.time, TIME, "minutes, hours:minutes:seconds or days-hours"),
        ("--gpus-per-node", slurm.gpus_per_node, GRES, "a number, or type:number"),
        ("--memory", slurm.memory, re.compile(r"\d{1,9}[KMGT]?"), "a size such as 64G"),
        ("--exclude", slurm.exclude, NODES, "a node list such as n[1-3],m2"),
    ):
        if value is not None:
            yield from _checked(where, value, pattern, possible)
    for where, value in (("--image", slurm.image), ("--mounts", slurm.mounts)):
        if value is not None:
            yield from _plain(where, value)
    devices = (slurm.gpus_per_node or "").rpartition(":")[2]
    if devices.isdigit() and job.ranks_per_node > int(devices):
        yield Problem("--ranks-per-node", str(job.ranks_per_node), f"at most {devices}, one rank for each device of "
                      "--gpus-per-node", f"give --ranks-per-node {devices}, or ask for more devices")
    if slurm.cpus_per_task is not None and slurm.cpus_per_task < 1:
        yield Problem("--cpus-per-task", str(slurm.cpus_per_task), "1 or more", "leave it out for the default")
    if not 1 <= slurm.chain <= 100:
        yield Problem("--chain", str(slurm.chain), "1 to 100 jobs", "choose how many jobs follow each other")
    if not 0 <= slurm.signal_seconds <= 65535:
        yield Problem("--signal-seconds", str(slurm.signal_seconds), "0 to 65535", "choose a shorter warning")
    if len(job.array) > 1000:
        yield Problem("--array", f"{len(job.array)} elements", "at most 1000", "submit it in parts")


def _checked(where: str, value: str, pattern: re.Pattern[str], possible: str) -> Iterator[Problem]:
    if not pattern.fullmatch(value):
        yield Problem(where, repr(value[:100]), possible, "use only such characters")


def _plain(where: str, value: str) -> Iterator[Problem]:
    if CONTROL.search(value):
        yield Problem(where, repr(value[:100]), "text without line breaks and control characters", "rename it")
