"""From a config to an engine."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import torch

from common.errors import UserError
from parallel.engine import Engine
from parallel.process_groups import Groups
from parallel.tensor_parallel import TensorParallel
from parallel.zero.offload import NoRoom
from pretrain.config.run_config import RunConfig
from pretrain.models import FAMILIES
from pretrain.objectives import make_loss
from pretrain.training.frozen_parameters import check_freeze, frozen_layers
from pretrain.training.optim import parameter_groups


def build_engine(config: RunConfig, groups: Groups, device: torch.device) -> Engine:
    """The config's family and objective on these groups.

    Raises:
        ConfigError: `model.freeze` does not fit the names of the model's parameters.
        UserError: a disc has no room for the optimizer's state.
    """
    check_freeze(config.model)
    modules = import_module(f"{FAMILIES[config.model.family]}.modules")
    optimizer = config.optimizer

    def make_optimizer(named: list, adamw: Callable[..., torch.optim.Optimizer]) -> torch.optim.Optimizer:
        return adamw(parameter_groups(named, optimizer.weight_decay), lr=optimizer.lr,
                     betas=(optimizer.beta1, optimizer.beta2), eps=optimizer.epsilon)

    try:
        return Engine(lambda tp: frozen_layers(modules.layers(config.model, tp), config.model.freeze),
                      make_loss(config.objective.name, config.model.family, TensorParallel(groups, device)), groups,
                      config.parallel, precision=config.precision, device=device, make_optimizer=make_optimizer,
                      clip_norm=optimizer.clip_norm, seed=config.run.seed)
    except NoRoom as error:
        raise UserError(str(error)) from None
