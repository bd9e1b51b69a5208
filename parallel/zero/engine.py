"""DeepSpeed's engines around a model that we built: the pipeline engine where there are stages, else its plain one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import deepspeed
import torch
from torch import Tensor

from parallel.eager_imports import eager_imports
from parallel.pipeline_stages import LayerSpec, Stage, WholeModel
from parallel.process_groups import Groups, Units
from parallel.zero.expert_groups import separate_experts
from parallel.zero.pipeline_module import StagePipeline, VShapedPipeline
from parallel.zero.settings import BUCKET_ELEMENTS

with eager_imports():
    import deepspeed.runtime.zero.muon.muon_optimizer  # each engine imports it when it starts


def partitioned_construction(config: dict, groups: Groups) -> AbstractContextManager:
    """A context in which ZeRO-3 cuts each parameter as soon as its module exists, so no rank ever holds the whole."""
    if config["zero_optimization"]["stage"] < 3:
        return nullcontext()
    return deepspeed.zero.Init(data_parallel_group=groups.replicas, config_dict_or_path=config, mpu=Units())


def start_engine(config: dict, specs: list[LayerSpec], bounds: list[int], stage: Stage, *,
                 wrapped: dict[str, Callable], loss: Callable[[Tensor, tuple], Tensor], groups: Groups,
                 optimizer: torch.optim.Optimizer):
    """DeepSpeed's pipeline engine when the layout has stages, its plain engine otherwise.

    Args:
        loss: (outputs of the last stage, labels) -> scalar; the plain engine is handed one with every micro-batch.
    """
    layout = groups.layout
    config = with_fitting_buckets(config, stage)
    piped = layout.pipeline > 1
    kind = VShapedPipeline if len(stage.spans) == 2 else StagePipeline
    model = (kind(specs, bounds, stage, wrapped, loss=loss, layout=layout) if piped
             else WholeModel(stage, wrapped))
    if layout.expert > 1:
        separate_experts(model, optimizer, groups)
    if piped:
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    else:
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, mpu=Units())
    if config["zero_optimization"]["stage"] == 2 and "offload_optimizer" not in config["zero_optimization"]:
        _keep_own_share(engine.optimizer)
    return engine


def _keep_own_share(optimizer) -> None:
    """Have ZeRO-2 sum gradients in one flat buffer of this rank's share.

    DeepSpeed does so where they are summed in another type than that of the weights. In fp32 it would keep whole
    every gradient of which a part is in the share, until the step.
    """
    optimizer._use_compact_grad_partition_buffer = lambda group: True


def with_fitting_buckets(config: dict, stage: Stage) -> dict:
    """A copy of the config with no bucket larger than what is exchanged: ZeRO-3 holds one all the time.

    `zero.Init` has read the config before the parameters could be counted; it takes no bucket from it.
    """
    num_parameters = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in stage.parameters()
                         if parameter.requires_grad)
    size = min(BUCKET_ELEMENTS, num_parameters + num_parameters % 2)  # an even number
    buckets = dict.fromkeys(("reduce_bucket_size", "allgather_bucket_size"), size)
    return {**config, "zero_optimization": {**config["zero_optimization"], **buckets}}


@torch.no_grad()
def settle_tied(engine) -> None:
    """Give a tied weight the bits of its first stage on the others too (group: the stages that hold it).

    DeepSpeed sums its gradient over the stages and then over the data ranks, there in buckets that lie differently on
    each stage. From three data ranks on the order of the sum differs, and the copies would drift apart.
    """
    engine.module._synchronize_tied_weights()


def init_distributed(backend: str) -> None:
    """Let DeepSpeed adopt the process group that parallel/ranks/rendezvous.py made."""
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
