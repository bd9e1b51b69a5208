"""From a config to an engine."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import torch

from common.errors import UserError
from parallel.engine import Engine
from parallel.objective import Objective
from parallel.process_groups import Groups
from parallel.tensor_parallel import TensorParallel
from parallel.zero.offload import NoRoom
from pretrain.config.run_config import RunConfig
from pretrain.models import FAMILIES
from pretrain.objectives import make_loss
from pretrain.training.optim import parameter_groups


def build_engine(config: RunConfig, groups: Groups, device: torch.device, *, objective: Objective | None = None
                 ) -> Engine:
    """The config's family on these groups, with the config's objective unless another one is given.

    Several engines may be built on the same groups. Raises UserError when a disc has no room for its state.
    """
    modules = import_module(f"{FAMILIES[config.model.family]}.modules")
    optimizer = config.optimizer

    def make_optimizer(named: list, adamw: Callable[..., torch.optim.Optimizer]) -> torch.optim.Optimizer:
        return adamw(parameter_groups(named, optimizer.weight_decay), lr=optimizer.lr,
                     betas=(optimizer.beta1, optimizer.beta2), eps=optimizer.epsilon)

    try:
        return Engine(lambda tp: modules.layers(config.model, tp),
                      objective or make_loss(config.objective, config.model, TensorParallel(groups, device)), groups,
                      config.parallel, config.precision, device, make_optimizer, optimizer.clip_norm, config.run.seed)
    except NoRoom as error:
        raise UserError(str(error)) from None
