"""Ranks as child processes of this machine: their environment, and that none outlives its parent."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import BinaryIO

from parallel.ranks.rank_info import LAUNCHER, LOOPBACK, STORE_FD, RankInfo

_PR_SET_PDEATHSIG = 1
# Blocked until the rank has installed its handlers (pretrain/training/stop_signals.py unblocks them): a request to save
# that arrives during imports is then kept instead of killing the rank.
HELD_BACK = (signal.SIGTERM, signal.SIGUSR1)


def rank_environment(base: Mapping[str, str], rank: int, nproc: int, port: int) -> dict[str, str]:
    """Variables of one rank: who it is, loopback as its only network, and its share of the cores."""
    environ = {name: text for name, text in base.items() if not name.startswith("TORCHELASTIC_")}
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", STORE_FD):
        environ.pop(name, None)  # meant for a cluster, or for another run
    RankInfo(rank, nproc, rank, nproc, master_address=LOOPBACK, master_port=port, source="local",
             node="").export(environ)
    environ[LAUNCHER] = "local"
    environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // nproc)))
    return environ


def usable_cores() -> int:
    """Cores this process may use, which is fewer than the machine has under a batch system."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def loopback_listener() -> socket.socket:
    """A listening socket on a free loopback port, taken now so that nobody else can take it before rank 0 is up."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.bind((LOOPBACK, 0))
    listener.listen(128)
    return listener


def start_rank(command: Sequence[str], environ: Mapping[str, str], output: BinaryIO | None,
               pass_fds: Sequence[int] = ()) -> subprocess.Popen[bytes]:
    """Starts one rank in a session of its own, so that a Ctrl-C of the terminal reaches it only through its parent.

    ``output`` takes its standard output and error; None lets it inherit the console. The kernel (Linux) kills it when
    the parent dies, however that happens.
    """
    # This process has no other thread while it starts ranks, so code between fork and exec is safe.
    return subprocess.Popen(
        list(command), env=dict(environ), stdin=subprocess.DEVNULL, stdout=output,
        stderr=None if output is None else subprocess.STDOUT, start_new_session=True, pass_fds=tuple(pass_fds),
        preexec_fn=dying_with_parent(),  # noqa: PLW1509
    )


def signal_group(child: subprocess.Popen[bytes], number: int) -> None:
    """Sends a signal to the rank and everything it started; quiet when they are gone."""
    try:
        os.killpg(child.pid, number)
    except (ProcessLookupError, PermissionError):
        return


def dying_with_parent(held_back: Collection[int] = HELD_BACK) -> Callable[[], None]:
    """For a child between fork and exec: it dies with this process, and `held_back` signals wait until it is ready."""
    parent = os.getpid()
    # Loaded before the fork: between fork and exec only simple calls are safe.
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None

    def prepare() -> None:
        if libc is not None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it died before the line above could see it
            os._exit(1)
        signal.pthread_sigmask(signal.SIG_BLOCK, held_back)

    return prepare
