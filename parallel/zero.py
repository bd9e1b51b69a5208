"""The doorway to DeepSpeed: from a layout to its configuration and engine. No other file imports it.

DeepSpeed's defaults are not ours (it clips at 1.0 when nothing is said and accepts unknown keys), so every key that
matters is written out here.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import SimpleNamespace

import deepspeed
import torch
from deepspeed.moe.layer import MoE
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.pipe import LayerSpec as _PipeLayer
from deepspeed.pipe import PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.dualpipev import DualPipeVModule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from deepspeed.sequence.linear_cross_entropy import vocab_parallel_linear_cross_entropy
from deepspeed.utils import groups as expert_groups
from torch import Tensor, nn

from parallel.config import ParallelConfig, PrecisionConfig
from parallel.layout import Layout
from parallel.megatron import Groups, TensorShard, Units
from parallel.pipeline import LayerSpec, Stage, WholeModel
from parallel.planner.memory import BUCKET_ELEMENTS
from parallel.vocabulary_loss import ChunkedCrossEntropy


def deepspeed_config(
    parallel: ParallelConfig, precision: PrecisionConfig, layout: Layout, on_accelerator: bool
) -> dict:
    """The whole DeepSpeed configuration of a run; gradient clipping is off because parallel/engine.py owns it."""
    sharded = parallel.zero_stage > 0
    half = precision.compute if sharded else "fp32"  # at stage 0 bf16 is cast on use, see parallel/precision.py
    return {
        "train_micro_batch_size_per_gpu": parallel.micro_batch,
        "gradient_accumulation_steps": parallel.global_batch // (parallel.micro_batch * layout.data),
        # its ranks of data are our replicas, which count a sample once on each context rank
        "train_batch_size": parallel.global_batch * layout.context,
        "gradient_clipping": 0.0,
        "prescale_gradients": False,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        "zero_allow_untested_optimizer": False,
        "communication_data_type": precision.compute if precision.reduce == "compute" else "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "bf16": {"enabled": half == "bf16", "immediate_grad_update": True},
        "fp16": {
            "enabled": half == "fp16",
            "loss_scale": 0,
            "initial_scale_power": precision.initial_scale_power,
            "loss_scale_window": precision.scale_window,
            "hysteresis": 1,
            "min_loss_scale": 1,
        },
        "zero_optimization": {
            **_offload(parallel.offload, on_accelerator),
            "stage": parallel.zero_stage,
            "overlap_comm": on_accelerator and parallel.zero_stage >= 2,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "round_robin_gradients": False,
            "reduce_bucket_size": BUCKET_ELEMENTS,
            "allgather_bucket_size": BUCKET_ELEMENTS,
            "stage3_param_persistence_threshold": 100_000,
            "stage3_prefetch_bucket_size": 50_000_000,
            "stage3_max_live_parameters": 1_000_000_000,
            "stage3_max_reuse_distance": 1_000_000_000,
            "sub_group_size": 1_000_000_000,
        },
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False, "activation_checkpoint_interval": 0},
        "activation_checkpointing": {"partition_activations": False, "cpu_checkpointing": False},
        "tensorboard": {"enabled": False},
        "flops_profiler": {"enabled": False},
        "comms_logger": {"enabled": False},
    }


def _offload(what: str, on_accelerator: bool) -> dict:
    """What of the states lies in host memory, pinned where an accelerator copies from it."""
    host = {"device": "cpu", "pin_memory": on_accelerator}
    sections = {"none": (), "optimizer": ("offload_optimizer",), "parameters": ("offload_optimizer", "offload_param")}
    return dict.fromkeys(sections[what], host)


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


def sharded_construction(config: dict, groups: Groups) -> AbstractContextManager:
    """A context in which ZeRO-3 cuts each parameter as soon as its module exists, so no rank ever holds the whole."""
    if config["zero_optimization"]["stage"] < 3:
        return nullcontext()
    return deepspeed.zero.Init(data_parallel_group=groups.replicas, config_dict_or_path=config, mpu=Units())


class _StagePipeline(PipelineModule):
    """DeepSpeed's pipeline module around a stage we built and cut ourselves."""

    def __init__(self, specs: list[LayerSpec], bounds: list[int], stage: Stage, wrapped: dict[str, Callable],
                 loss: Callable, layout: Layout):
        self._bounds = bounds
        self._built = (stage, wrapped)
        tied = {spec.tied_to for spec in specs if spec.tied_to}
        layers = [self._describe(spec, tied) for spec in specs]
        topology = PipeModelDataParallelTopology(num_pp=layout.pipeline, num_mp=layout.tensor, num_dp=layout.replicas)
        super().__init__(layers, topology=topology, loss_fn=loss, activation_checkpoint_interval=0)

    @staticmethod
    def _describe(spec: LayerSpec, tied: set[str]):
        key = spec.name if spec.name in tied else spec.tied_to
        if key:  # DeepSpeed keeps it in a ModuleDict, which takes no dots
            return TiedLayerSpec(key.replace(".", "/"), nn.Identity, tied_weight_attr=["weight"])
        return _PipeLayer(nn.Identity)

    def _partition_layers(self, method: str = "") -> None:
        stage = self._topo.get_coord(self.global_rank).pipe
        self.parts = self._bounds
        self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])

    def _build(self) -> None:
        self.stage, _ = self._built
        for layer in self._layer_specs:
            if isinstance(layer, TiedLayerSpec) and layer.key.replace("/", ".") in self.stage.by_name:
                self.tied_modules[layer.key] = self.stage.by_name[layer.key.replace("/", ".")]
                self.tied_weight_attrs[layer.key] = layer.tied_weight_attr
        self._build_calls()
        for parameter in self.parameters():
            parameter.ds_pipe_replicated = False

    def _build_calls(self) -> None:
        self.forward_funcs = self._calls(self.stage.specs)

    def _calls(self, specs: list[LayerSpec]) -> list[Callable]:
        stage, wrapped = self._built
        calls = []
        for spec in specs:
            call = wrapped.get(spec.name, stage.by_name[spec.name])
            calls.append(partial(_call_tied, call, stage.by_name[spec.tied_to]) if spec.tied_to else call)
        return calls

    def get_tied_weights_and_groups(self) -> list:
        """Tied weights with the groups of stages that hold them, for the sum of their gradients.

        DeepSpeed looks for the gradient at the weight. Its ZeRO 1 optimizer in 16 bits (fp16, or with offload) has
        moved it to an fp32 sum, and the tied stages would each step with their own part of it.
        """
        found = super().get_tied_weights_and_groups()
        sums = [getattr(weight, "grad_accum", None) for weight, _ in found]
        return [(weight if total is None else SimpleNamespace(grad=total), group)
                for (weight, group), total in zip(found, sums, strict=True)]


class _FoldedPipeline(_StagePipeline, DualPipeVModule):
    """The same over the two spans of layers that a rank has in DeepSpeed's DualPipeV."""

    def _partition_layers(self, method: str = "") -> None:
        self.num_stages *= 2
        super()._partition_layers(method)
        back = self.num_stages - 1 - self.stage_id
        self.phase_bounds = [(self._local_start, self._local_stop), (self.parts[back], self.parts[back + 1])]

    def _build_calls(self) -> None:
        self.phase_funcs = [self._calls(span) for span in self.stage.spans]
        self.phase_checkpointable = [[], []]
        self.activate_phase(0)


def _call_tied(layer: Callable, tied: nn.Module, state):
    return layer(state, tied)


class _SpreadExperts(MoE):
    """Tells DeepSpeed that parameters are spread over the expert axis, and the groups of that axis.

    It takes notice of experts only where it finds a module of its own class. This one has no parameters and is never
    called; DeepSpeed calls `set_deepspeed_parallelism` before it asks for groups.
    """

    def __init__(self, groups: Groups):
        nn.Module.__init__(self)
        self.num_experts = groups.layout.expert  # DeepSpeed keeps it for its own checkpoints
        self.groups = groups

    def set_deepspeed_parallelism(self, *_) -> None:
        name, layout, rank = _expert_group_name(self.groups), self.groups.layout, self.groups.rank
        for table, value in ((expert_groups._EXPERT_PARALLEL_GROUP, self.groups.expert),
                             (expert_groups._EXPERT_PARALLEL_GROUP_RANKS, layout.group("ep", rank)),
                             (expert_groups._EXPERT_DATA_PARALLEL_GROUP, self.groups.expert_data),
                             (expert_groups._EXPERT_DATA_PARALLEL_GROUP_RANKS, layout.group("edp", rank))):
            table.clear()  # DeepSpeed keeps those of an earlier engine of this process
            table[name] = value


def _expert_group_name(groups: Groups) -> str:
    return f"ep_size_{groups.layout.expert}"  # DeepSpeed reads the degree from it


def _separate_experts(model: nn.Module, optimizer: torch.optim.Optimizer, groups: Groups) -> None:
    """Mark the experts' parameters as reduced over the expert-data group only, and give them groups of their own."""
    name = _expert_group_name(groups)
    separated = []
    for group in optimizer.param_groups:
        experts = [p for p in group["params"] if p.plan.stack]
        for parameter in experts:
            parameter.allreduce, parameter.group_name = False, name
        rest = [p for p in group["params"] if not p.plan.stack]
        if rest:
            separated.append({**group, "params": rest})
        if experts:
            separated.append({**group, "params": experts, "moe": True, "name": name})
    if any(group.get("moe") for group in separated):
        model.spread_experts = _SpreadExperts(groups)
        optimizer.param_groups[:] = separated


def start_engine(config: dict, specs: list[LayerSpec], bounds: list[int], stage: Stage, wrapped: dict[str, Callable],
                 loss: Callable[[Tensor, tuple], Tensor], groups: Groups, optimizer: torch.optim.Optimizer):
    """DeepSpeed's pipeline engine when the layout has stages, its plain engine otherwise."""
    layout = groups.layout
    _fit_buckets(config, stage)
    piped = layout.pipeline > 1
    kind = _FoldedPipeline if len(stage.spans) == 2 else _StagePipeline
    model = kind(specs, bounds, stage, wrapped, loss, layout) if piped else WholeModel(stage, wrapped, loss)
    if layout.expert > 1:
        _separate_experts(model, optimizer, groups)
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


def _fit_buckets(config: dict, stage: Stage) -> None:
    """No bucket larger than what is to be exchanged: ZeRO-3 holds one all the time."""
    num_parameters = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in stage.parameters())
    for key in ("reduce_bucket_size", "allgather_bucket_size"):
        config["zero_optimization"][key] = min(BUCKET_ELEMENTS, num_parameters + num_parameters % 2)  # an even number


def chunked_cross_entropy(shard: TensorShard, chunk_tokens: int) -> ChunkedCrossEntropy:
    """DeepSpeed's cross entropy fused with the head: logits of `chunk_tokens` tokens at a time, over the tensor group.

    Its backward makes them again in blocks of the vocabulary of the same size, so that each row of the weight's
    gradient is one product over all tokens, and sums the gradient of `hidden` over blocks and tensor ranks in fp32.
    """

    def losses(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
        first = shard.rank * weight.shape[0]
        return vocab_parallel_linear_cross_entropy(
            hidden, weight, labels, bias, tp_group=shard.group if shard.size > 1 else None, vocab_start_index=first,
            vocab_end_index=first + weight.shape[0], reduction="none", chunk_size=chunk_tokens)

    return losses


@torch.no_grad()
def settle_tied(engine) -> None:
    """Give a tied weight the bits of its first stage on the others too (group: the stages that hold it).

    DeepSpeed sums its gradient over the stages and then over the data ranks, there in buckets that lie differently on
    each stage. From three data ranks on the order of the sum differs, and the copies would drift apart.
    """
    engine.module._synchronize_tied_weights()


def init_distributed(backend: str) -> None:
    """Let DeepSpeed adopt the process group that parallel/rendezvous.py made."""
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
