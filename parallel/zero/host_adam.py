"""AdamW where the optimizer's state is: torch's fused one, or DeepSpeed's for host memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam


def adamw(offload: str) -> Callable[..., torch.optim.Optimizer]:
    """AdamW where the optimizer's state is: torch's fused one, or DeepSpeed's for host memory."""
    return partial(torch.optim.AdamW, fused=True) if offload == "none" else _host_adam


def _host_adam(*args, **settings) -> DeepSpeedCPUAdam:
    optimizer = DeepSpeedCPUAdam(*args, adamw_mode=True, **settings)
    optimizer.register_step_pre_hook(_forget_powers)
    return optimizer


def _forget_powers(optimizer: DeepSpeedCPUAdam, *_) -> None:
    """Have beta^step computed anew in each step.

    While one step follows another DeepSpeed multiplies the last power by beta, and in the first step after a restart
    it takes pow(beta, step), which is rounded otherwise: the resumed run would leave the curve by a last bit. A step
    "0" over one scratch element makes every step the second case.
    """
    scratch = [torch.zeros(1) for _ in range(4)]
    group = optimizer.param_groups[0]
    optimizer.ds_opt_adam.adam_update(optimizer.opt_id, 0, 0.0, *group["betas"], group["eps"], 0.0, False, *scratch)
