"""Runs a function as several real ranks over gloo on loopback: fresh processes, forked from a server that is warm.

The server imports torch, DeepSpeed and megatron-core once; a case then costs its own work. Fresh processes, because
DeepSpeed and megatron-core keep groups in module globals.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from parallel.ranks.rank_info import LOOPBACK, RankInfo

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.helpers.warm"])


def run_ranks(target: Callable[..., Any], world_size: int, *args: Any, timeout_seconds: float = 900.0) -> list[Any]:
    """`target(rank_info, *args)` on `world_size` ranks; what each returned, by rank.

    Raises:
        AssertionError: a rank failed or did not end in time; the message holds the first failure's traceback. No
            process is left behind.
    """
    listener = socket.create_server((LOOPBACK, 0))
    pipes, processes = [], []
    for rank in range(world_size):
        receive, send = CONTEXT.Pipe(duplex=False)
        process = CONTEXT.Process(target=_child,  # not a daemon: those may have no loader workers
                                  args=(target, rank, world_size, listener if rank == 0 else None,
                                        listener.getsockname()[1], send, args))
        process.start()
        send.close()
        pipes.append(receive)
        processes.append(process)
    listener.close()
    try:
        return _collect(pipes, timeout_seconds)
    finally:
        for process in processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()


def _collect(pipes: list[Connection], timeout_seconds: float) -> list[Any]:
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout_seconds
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            missing = [rank for rank in range(len(pipes)) if rank not in results]
            raise AssertionError(f"ranks {missing} did not end within {timeout_seconds} s")
        for pipe in ready:
            rank = pipes.index(pipe)
            try:
                failure, value = pipe.recv()
            except EOFError:
                raise AssertionError(f"rank {rank} died without a word") from None
            if failure:
                raise AssertionError(f"rank {rank} failed:\n{failure}")
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def _child(target: Callable[..., Any], rank: int, world_size: int, listener: socket.socket | None, port: int,
           send: Connection, args: tuple) -> None:
    import torch

    torch.set_num_threads(1)
    info = RankInfo(rank, world_size, rank, world_size, master_address=LOOPBACK, master_port=port, source="local",
                    node="localhost",
                    store_fd=listener.detach() if listener else None, port_is_fixed=True)
    info.export(os.environ)
    try:
        send.send((None, target(info, *args)))
    except BaseException:
        send.send((traceback.format_exc(), None))


def train(info: RankInfo, config_path: str, overrides: list[str]) -> int:
    """What `trainyard train` does in a rank that its launcher started; returns the exit code."""
    from pretrain.commands.train import run_rank
    from pretrain.config.run_config import load_run
    from pretrain.reporting import report

    return report(lambda: run_rank(load_run(config_path, overrides, info.world_size), info))


def train_on(world_size: int, config_path: Path, overrides: list[str], **kwargs: Any) -> list[int]:
    """Exit codes of a training run on `world_size` ranks."""
    return run_ranks(train, world_size, str(config_path), overrides, **kwargs)
