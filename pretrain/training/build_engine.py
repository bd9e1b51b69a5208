"""From a config to an engine."""

from __future__ import annotations

from collections.abc import Callable

import torch

from parallel.engine import Engine
from parallel.objective import Objective
from parallel.process_groups import Groups
from parallel.tensor_parallel import TensorParallel
from parallel.tensor_slice import Source
from pretrain.config.run_config import RunConfig
from pretrain.models.build import layer_list
from pretrain.objectives import make_loss
from pretrain.training.frozen_parameters import check_freeze, frozen_layers
from pretrain.training.optim import parameter_groups


def build_engine(config: RunConfig, groups: Groups, device: torch.device, source: Source | None = None, *,
                 objective: Objective | None = None) -> Engine:
    """The config's family on these groups; several engines may be built on the same groups.

    Args:
        source: where weights and moments come from; None for weights drawn from `run.seed`.
        objective: in place of the config's own.

    Raises:
        ConfigError: `model.freeze` does not fit the names of the model's parameters.
        NoRoom: a disk has no room for the optimizer state.
    """
    check_freeze(config.model)
    optimizer = config.optimizer

    def make_optimizer(named: list, adamw: Callable[..., torch.optim.Optimizer]) -> torch.optim.Optimizer:
        return adamw(parameter_groups(named, optimizer.weight_decay), lr=optimizer.lr,
                     betas=(optimizer.beta1, optimizer.beta2), eps=optimizer.epsilon)

    return Engine(lambda tp: frozen_layers(layer_list(config.model, tp, config.num_predictions), config.model.freeze),
                  objective or make_loss(config.objective, config.model, TensorParallel(groups, device)), groups,
                  config.parallel, precision=config.precision, device=device, make_optimizer=make_optimizer,
                  clip_norm=optimizer.clip_norm, seed=config.run.seed, source=source)
