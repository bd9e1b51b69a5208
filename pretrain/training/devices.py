"""The device of a rank."""

from __future__ import annotations

import torch

from common.errors import UserError
from parallel.ranks.rank_info import RankInfo
from parallel.zero.offload import lacking_for_offload
from pretrain.config.run_config import RunConfig


def choose_device(config: RunConfig, info: RankInfo) -> tuple[torch.device, str]:
    """This rank's device and its name.

    Raises:
        UserError: more ranks on this machine than devices, fp16 without an accelerator, or offload without what it
            needs.
    """
    device, name = local_device(info)
    if config.precision.compute == "fp16" and device.type == "cpu":
        raise UserError("precision.compute=fp16 needs an accelerator; this machine has none, and DeepSpeed's CPU "
                        "accelerator refuses it: set precision.compute=bf16 or fp32")
    lacking = lacking_for_offload(config.parallel, device.type)
    if lacking:
        raise UserError(lacking)
    return device, name


def local_device(info: RankInfo) -> tuple[torch.device, str]:
    """The device of this rank's number on its node, and its name. Raises UserError for more ranks than devices."""
    if not torch.cuda.is_available():
        return torch.device("cpu"), "cpu"
    if info.local_rank >= torch.cuda.device_count():
        raise UserError(f"rank {info.rank} is number {info.local_rank} on {info.node}, which has "
                        f"{torch.cuda.device_count()} devices: start at most one rank for each device")
    torch.cuda.set_device(info.local_rank)
    return torch.device("cuda", info.local_rank), torch.cuda.get_device_name(info.local_rank)
