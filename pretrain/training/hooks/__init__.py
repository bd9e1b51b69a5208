"""Hooks: what happens beside training at its named moments."""

from typing import Any

from pretrain.training.hooks.console import ConsoleHook
from pretrain.training.hooks.curve import CurveHook
from pretrain.training.hooks.health import HealthHook
from pretrain.training.hooks.hook import Hook, Hooks, RunView
from pretrain.training.hooks.metrics_file import MetricsFileHook
from pretrain.training.hooks.tensorboard import TensorBoardHook
from pretrain.training.third_party_output import ThirdPartyOutput

__all__ = [
    "ConsoleHook", "CurveHook", "HealthHook", "Hook", "Hooks", "MetricsFileHook", "RunView",
    "TensorBoardHook", "standard_hooks",
]  # fmt: skip


def standard_hooks(config: Any, quiet: ThirdPartyOutput | None = None) -> Hooks:
    """The hooks of every run, in their order: the record first, the curve from it, then the word to the person.

    The check of the weights comes last: it may end the run, and the step that it ends at is told all the same.
    """
    hooks: list[Hook] = [MetricsFileHook()]
    if config.log.tensorboard:
        hooks.append(TensorBoardHook())
    hooks.append(CurveHook())
    hooks.append(ConsoleHook(quiet))
    if config.run.check_every:
        hooks.append(HealthHook(config.run.check_every))
    return Hooks(hooks)
