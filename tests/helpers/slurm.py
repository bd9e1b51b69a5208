"""A real Slurm for tests: controller, authentication and several virtual nodes on loopback, in one temporary folder.

Needs no systemd, cgroups or database. As root every node has its own host name (and an /etc/hosts that knows them all)
in a namespace of its own, so that ranks meet by node names as on a cluster.
"""

import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

INSTALL = "apt-get install -y --no-install-recommends slurm-wlm munge"
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "unshare")
SEARCH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY", "DEADLINE")


def why_not() -> str | None:
    """Why no Slurm can be started here, with the command that helps; None when one can."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=SEARCH) is None]
    if missing:
        return f"{', '.join(missing)} not installed: {INSTALL}"
    return None if os.geteuid() == 0 else "virtual nodes with names of their own need root"


class LocalSlurm:
    """The cluster: nodes n1, n2, ... with ``cpus`` each. Everything it started is gone after ``down``.

    ``enforce``: sbatch refuses what breaks the limits; else, as Slurm does by default, it waits in the queue for ever.
    """

    def __init__(self, folder: Path, nodes: int, cpus: int, enforce: bool = True):
        self.folder, self.names = folder, [f"n{index}" for index in range(1, nodes + 1)]
        self.cpus, self.enforce = cpus, enforce
        self.conf = folder / "slurm.conf"
        self._started: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def environ(self) -> dict[str, str]:
        """Variables with which Slurm's commands speak to this cluster."""
        return {name: text for name, text in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))} | {
            "PATH": SEARCH, "SLURM_CONF": str(self.conf)}

    def up(self) -> None:
        for name in ("state", "log", "munge", *(f"spool/{name}" for name in self.names),
                     *(f"tmp/{name}" for name in self.names)):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)
        for name in self.names:
            (self.folder / "tmp" / name).chmod(0o1777)
        self.conf.write_text(self._conf())
        (self.folder / "cgroup.conf").write_text(self._cgroup())
        host = socket.gethostname().partition(".")[0]
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost {host} {' '.join(self.names)}\n::1 ip6-localhost\n")
        self._start_munge()
        self.start_controller()
        for name in self.names:
            self.start_node(name)
        wait_until(lambda: self.node_states() == dict.fromkeys(self.names, "idle"), 60, "all nodes idle")

    def _start_munge(self) -> None:
        folder = self.folder / "munge"
        folder.chmod(0o755)
        key = folder / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        self._start("munged", ["munged", "--foreground", f"--socket={folder / 'socket'}", f"--key-file={key}",
                               f"--pid-file={folder / 'pid'}", f"--log-file={self.folder / 'log' / 'munged.log'}",
                               f"--seed-file={folder / 'seed'}"])
        wait_until((folder / "socket").exists, 20, f"munged answers, see {self.folder / 'log' / 'munged.out'}")

    def start_controller(self) -> None:
        self._start("slurmctld", ["slurmctld", "-D"])
        wait_until(lambda: self._quiet("sinfo", "-h"), 30, "slurmctld answers")

    def kill_controller(self) -> None:
        self._started["slurmctld"].kill()
        self._started["slurmctld"].wait()

    def start_node(self, name: str) -> None:
        inner = 'hostname "$1" && mount --bind "$2" /etc/hosts && exec slurmd -D -N "$1"'
        self._start(name, ["unshare", "--uts", "--mount", "sh", "-c", inner, "sh", name, str(self.folder / "hosts")])

    def kill_node(self, name: str) -> None:
        """The node loses its power: its daemon first, so that it can report nothing, then all that runs there."""
        self._started[name].kill()
        self._started[name].wait()
        for _ in range(3):
            for pid in self.processes(name):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)

    def on_node(self, name: str, *words: str) -> None:
        """Runs a command where the node's processes run, among its own mounts."""
        subprocess.run(["nsenter", "--mount", "--uts", f"--target={self._started[name].pid}", *words], check=True)

    def down(self) -> None:
        """Cancels jobs, stops daemons; raises AssertionError when a process is left."""
        controller = self._started.get("slurmctld")
        if controller is not None and controller.poll() is None:
            self._quiet("scancel", "--full", "--signal=KILL", "--me")
            self._quiet("scancel", "--me")
            with suppress(AssertionError):
                wait_until(lambda: not self.run("squeue", "-h").strip(), 10, "the queue is empty")
        for process in reversed(self._started.values()):
            process.terminate()
        for process in self._started.values():
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not self.processes(), 10, "no process is left")

    def run(self, *words: str) -> str:
        """Output of one of Slurm's commands. Raises AssertionError with what it said."""
        done = subprocess.run(words, env=self.environ, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
        return done.stdout

    def _quiet(self, *words: str) -> bool:
        with suppress(AssertionError, subprocess.TimeoutExpired):
            self.run(*words)
            return True
        return False

    def node_states(self) -> dict[str, str]:
        lines = self.run("sinfo", "-h", "-N", "-o", "%N %t").splitlines()
        return dict(line.split() for line in lines)

    def job(self, job_id: str) -> dict[str, str]:
        """What scontrol says about a job."""
        fields = self.run("scontrol", "--oneliner", "show", "job", job_id).split()
        return dict(field.partition("=")[::2] for field in fields if "=" in field)

    def wait_for_state(self, job_id: str, *states: str, seconds: float = 900) -> str:
        """Waits for one of the states (default: any end); returns the state reached."""
        wanted = states or OVER
        wait_until(lambda: self.job(job_id)["JobState"] in wanted, seconds, f"job {job_id} {'/'.join(wanted)}")
        return self.job(job_id)["JobState"]

    def start_requeued_now(self, job_id: str, seconds: float = 120) -> None:
        """Skips the two minutes that a requeued job waits. Not within its first second: its credential is new."""
        self.wait_for_state(job_id, "PENDING", seconds=seconds)
        time.sleep(2.5)
        self.run("scontrol", "update", f"jobid={job_id}", "StartTime=now")

    def processes(self, node: str | None = None) -> list[int]:
        """Processes of the cluster (of one node): those with its configuration, or with a file in its folder open."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            pid = int(path.name)
            if pid != os.getpid() and self._belongs(path, node):
                found.append(pid)
        return found

    def _belongs(self, path: Path, node: str | None) -> bool:
        try:
            if path.joinpath("stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return False
            environ = path.joinpath("environ").read_bytes().split(b"\0")
            opened = [os.readlink(link) for link in path.joinpath("fd").iterdir()]
        except OSError:
            return False
        of_slurm = f"SLURM_CONF={self.conf}".encode() in environ
        if node is None:
            # A test's own shell may carry SLURM_CONF too; daemons and tasks also carry a mark, or a file in the folder.
            in_job = any(entry.startswith((b"SLURMD_NODENAME=", b"TRAINYARD_TEST_DAEMON=")) for entry in environ)
            return of_slurm and in_job or any(name.startswith(f"{self.folder}/log/") for name in opened)
        return (of_slurm and f"SLURMD_NODENAME={node}".encode() in environ) or f"{self.folder}/log/{node}.log" in opened

    def _start(self, name: str, words: list[str]) -> None:
        with (self.folder / "log" / f"{name}.out").open("ab") as output:
            self._started[name] = subprocess.Popen(
                words, env=self.environ | {"TRAINYARD_TEST_DAEMON": name}, stdin=subprocess.DEVNULL, stdout=output,
                stderr=output, start_new_session=True)

    def _cgroup(self) -> str:
        # Newer daemons set cgroups up even where no plugin asks for them; older ones do not know the word.
        version = subprocess.run(["slurmd", "-V"], env=os.environ | {"PATH": SEARCH}, capture_output=True, text=True,
                                 check=True).stdout.split()[-1]
        return "CgroupPlugin=disabled\n" if int(version.partition(".")[0]) >= 23 else ""

    def _conf(self) -> str:
        host = socket.gethostname().partition(".")[0]
        port = _free_ports(len(self.names) + 1)
        folder = self.folder
        lines = [
            "ClusterName=test", f"SlurmctldHost={host}(127.0.0.1)", "SlurmUser=root", "SlurmdUser=root",
            "AuthType=auth/munge", "CredType=cred/munge", f"AuthInfo=socket={folder}/munge/socket",
            f"SlurmctldPort={port}", "CommunicationParameters=NoInAddrAny,NoCtldInAddrAny",
            f"StateSaveLocation={folder}/state", f"SlurmdSpoolDir={folder}/spool/%n", f"TmpFS={folder}/tmp/%n",
            f"SlurmctldPidFile={folder}/ctld.pid", f"SlurmdPidFile={folder}/%n.pid",
            f"SlurmctldLogFile={folder}/log/slurmctld.log", f"SlurmdLogFile={folder}/log/%n.log",
            "ProctrackType=proctrack/linuxproc", "TaskPlugin=task/none", "JobAcctGatherType=jobacct_gather/none",
            "AccountingStorageType=accounting_storage/none", "SwitchType=switch/none", "MpiDefault=none",
            "SelectType=select/cons_tres", "SelectTypeParameters=CR_CPU", "SlurmdParameters=config_overrides",
            "SchedulerType=sched/backfill", "SchedulerParameters=sched_interval=1,bf_interval=1",
            "ReturnToService=2", "JobRequeue=1",
            f"EnforcePartLimits={'ALL' if self.enforce else 'NO'}", "SlurmctldTimeout=30", "SlurmdTimeout=10",
            "KillWait=30", "InactiveLimit=0", "MinJobAge=3600", "MessageTimeout=30", "UnkillableStepTimeout=60",
            *(f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port + index} CPUs={self.cpus} "
              "RealMemory=1000" for index, name in enumerate(self.names, 1)),
            "PartitionName=batch Nodes=ALL Default=YES MaxTime=1:00:00 DefaultTime=30 State=UP OverSubscribe=NO",
        ]
        return "\n".join(lines) + "\n"


@contextmanager
def local_slurm(nodes: int = 2, cpus: int = 2, enforce: bool = True) -> Iterator[LocalSlurm]:
    """A cluster that is there inside the block, and gone after it."""
    # Not in pytest's folder: munge wants its socket where every user could reach it.
    folder = Path(tempfile.mkdtemp(prefix="trainyard-slurm-"))
    cluster = LocalSlurm(folder, nodes, cpus, enforce)
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.down()
        shutil.rmtree(folder, ignore_errors=True)


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Polls; raises AssertionError naming what did not happen."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.3)


def _free_ports(count: int) -> int:
    """The first of several ports in a row on which nobody listens, below those of outgoing connections."""
    chooser = random.Random(os.urandom(8))
    for _ in range(50):
        first = chooser.randrange(12_000, 19_000)
        if all(_is_free(first + index) for index in range(count)):
            return first
    raise AssertionError("no free row of ports")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
