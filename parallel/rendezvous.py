"""Brings the ranks of a run together and lets them leave in order."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from parallel.rank_info import RankInfo


def join(info: RankInfo, timeout_seconds: float = 1800.0) -> None:
    """Start torch.distributed among the ranks of a run."""
    info.export(os.environ)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    limit = timedelta(seconds=timeout_seconds)
    if info.world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=limit)
        return
    if info.source == "local":
        store = dist.TCPStore(info.master_address, info.master_port, info.world_size, is_master=info.rank == 0,
                              timeout=limit, wait_for_workers=False, use_libuv=info.store_fd is None,
                              master_listen_fd=info.store_fd if info.rank == 0 else None)
        dist.init_process_group(backend, store=store, rank=info.rank, world_size=info.world_size, timeout=limit)
        return
    dist.init_process_group(backend, rank=info.rank, world_size=info.world_size, timeout=limit)


def leave() -> None:
    """End the process group; without it one end in six aborts."""
    if dist.is_initialized():
        dist.destroy_process_group()
