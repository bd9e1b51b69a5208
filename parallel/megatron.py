"""The doorway to megatron-core: rank groups, tensor-parallel layers and regions. No other file imports it.

Tensor shapes in this file: s the part of the sequence that this context rank holds, b micro-batch, h hidden,
v vocabulary; t is the tensor-parallel degree.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

with warnings.catch_warnings():
    # megatron-core says at import that Apex and Transformer Engine are absent; nothing here uses them.
    warnings.simplefilter("ignore")
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.model_parallel_config import ModelParallelConfig

from parallel.context import ContextShard
from parallel.initialise import Std, plan_parameter
from parallel.layout import Layout


@dataclass(frozen=True)
class Groups:
    """The process groups of this rank, one per axis, as megatron-core built them and `Layout` predicts them."""

    layout: Layout
    rank: int
    tensor: dist.ProcessGroup
    context: dist.ProcessGroup
    pipeline: dist.ProcessGroup
    data: dist.ProcessGroup
    expert: dist.ProcessGroup  # ep: data ranks that together hold every expert of a layer once
    expert_data: dist.ProcessGroup  # edp: data ranks that hold the same experts
    model: dist.ProcessGroup  # tp x ep x pp: everybody who holds a part of one model replica
    replicas: dist.ProcessGroup  # cp x dp: everybody who holds the same part of the model

    @property
    def coordinates(self):
        return self.layout.coordinates(self.rank)

    @property
    def replica(self) -> int:
        """This rank's place among those that hold the same weights."""
        return self.layout.replica(self.rank)


def answer_for_cuda() -> None:
    """Let megatron-core's questions for the current CUDA device be answered where there is none.

    Its regions allocate on `torch.cuda.current_device()`, also for gloo. With no CUDA the right answer is the CPU; this
    one line saves a second implementation of its layers.
    """
    if not torch.cuda.is_available():
        torch.cuda.current_device = lambda: torch.device("cpu")


def build_groups(layout: Layout, timeout_seconds: float = 1800.0) -> Groups:
    """Create every axis's group and check them against the layout's own arithmetic.

    Args:
        timeout_seconds: how long a collective on one of them may take.

    Raises:
        RuntimeError: megatron-core places a rank in another group than `Layout` says (an internal error).
    """
    answer_for_cuda()
    rank = dist.get_rank()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=timeout_seconds / 60,
    )
    groups = Groups(
        layout=layout,
        rank=rank,
        tensor=parallel_state.get_tensor_model_parallel_group(),
        context=parallel_state.get_context_parallel_group(),
        pipeline=parallel_state.get_pipeline_model_parallel_group(),
        data=parallel_state.get_data_parallel_group(),
        expert=parallel_state.get_expert_model_parallel_group(),
        expert_data=parallel_state.get_expert_data_parallel_group(),
        model=parallel_state.get_expert_tensor_model_pipeline_parallel_group(),
        replicas=parallel_state.get_data_parallel_group(with_context_parallel=True),
    )
    for axis, group in (("tp", groups.tensor), ("cp", groups.context), ("pp", groups.pipeline), ("dp", groups.data),
                        ("ep", groups.expert), ("edp", groups.expert_data), ("model", groups.model),
                        ("replicas", groups.replicas)):
        expected, found = layout.group(axis, rank), dist.get_process_group_ranks(group)
        if sorted(expected) != sorted(found):
            raise RuntimeError(f"rank {rank}: axis {axis} should hold ranks {expected}, megatron-core built {found}")
    return groups


def destroy_groups() -> None:
    """Forget every group, so that another layout can be built in the same process."""
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_global_memory_buffer()


class Units:
    """The model-parallel unit (`mpu`) that DeepSpeed asks for groups, answered by megatron-core under its names.

    What DeepSpeed calls data parallel are the ranks that hold the same weights, so the context axis is part of it.
    """

    get_data_parallel_group = staticmethod(partial(parallel_state.get_data_parallel_group, True))
    get_data_parallel_world_size = staticmethod(partial(parallel_state.get_data_parallel_world_size, True))
    get_data_parallel_rank = staticmethod(partial(parallel_state.get_data_parallel_rank, True))
    get_data_parallel_src_rank = staticmethod(partial(parallel_state.get_data_parallel_src_rank, True))

    def __getattr__(self, name: str):
        return getattr(parallel_state, name.replace("get_model_parallel", "get_tensor_model_parallel"))


class _SumGradientOverTensorAxis(torch.autograd.Function):
    """Identity forward; backward sums over the tensor group.

    With sequence parallelism each tensor rank sees only its part of the sequence, so the gradient of a parameter that
    all of them hold in full (norms, biases added after the reduce-scatter) is a partial sum per rank.
    """

    @staticmethod
    def forward(ctx, parameter: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


class _ColumnLinear(tensor_parallel.ColumnParallelLinear):
    def _forward_impl(self, input, weight, *args, bias=None, **kwargs):
        if self.tp_group.size() == 1:  # nothing to communicate: torch's own fused linear
            return F.linear(input, weight, bias)
        return super()._forward_impl(input, weight, *args, bias=bias, **kwargs)

    def forward(self, x: Tensor) -> Tensor:  # [s(/t), b, in] -> [s, b, out/t]
        return super().forward(x)[0]


class _RowLinear(tensor_parallel.RowParallelLinear):
    """`bias` is added after the reduction, by us, so that its gradient is right under sequence parallelism."""

    def __init__(self, *args, shard: TensorShard, **kwargs):
        super().__init__(*args, input_is_parallel=True, skip_bias_add=True, **kwargs)
        self.shard = shard

    def _forward_impl(self, input, weight, *args, **kwargs):
        if self.tp_group.size() == 1:
            # skip_bias_add keeps the bias away from megatron-core; alone we can fuse it.
            return F.linear(input, weight, self.bias)
        return super()._forward_impl(input, weight, *args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:  # [s, b, in/t] -> [s(/t), b, out]
        output, bias = super().forward(x)
        if bias is None or self.tp_group.size() == 1:
            return output
        return output + self.shard.shared(bias)


class TensorShard:
    """What a block needs to know of the tensor axis: makes parallel layers and moves activations between regions."""

    def __init__(self, groups: Groups | None, device: torch.device, dtype: torch.dtype = torch.float32):
        """With `groups` None the layers are those of a single rank (counting, generation before a group exists)."""
        self.groups = groups
        self.group = groups.tensor if groups else None
        self.size = groups.layout.tensor if groups else 1
        self.rank = groups.coordinates.tp if groups else 0
        self.sequence = bool(groups and groups.layout.sequence and self.size > 1)
        self.context = ContextShard(groups.context, groups.layout.context, groups.coordinates.cp) if groups \
            else ContextShard()
        self.device = device
        self.config = ModelParallelConfig(
            tensor_model_parallel_size=self.size,
            pipeline_model_parallel_size=groups.layout.pipeline if groups else 1,
            sequence_parallel=self.sequence,
            params_dtype=dtype,
            pipeline_dtype=dtype,
            use_cpu_initialization=device.type != "cuda",
            perform_initialization=False,  # parallel/initialise.py draws every weight from its global name
            gradient_accumulation_fusion=False,
        )

    def column(self, size_in: int, size_out: int, *, bias: bool, std: Std) -> nn.Module:
        """Linear whose output dim is sliced over the tensor axis: [.., in] -> [.., out/t]."""
        layer = _ColumnLinear(size_in, size_out, config=self.config, init_method=None, bias=bias,
                              gather_output=False, tp_group=self.group)
        plan_parameter(layer.weight, std=std, slice_dim=0)
        if bias:
            plan_parameter(layer.bias, slice_dim=0)
        return layer

    def row(self, size_in: int, size_out: int, *, bias: bool, std: float) -> nn.Module:
        """Linear whose input dim is sliced over the tensor axis, output summed over it: [.., in/t] -> [.., out]."""
        layer = _RowLinear(size_in, size_out, config=self.config, init_method=None, bias=bias,
                           tp_group=self.group, shard=self)
        plan_parameter(layer.weight, std=std, slice_dim=1)
        if bias:
            plan_parameter(layer.bias)
        return layer

    def vocabulary(self, size: int, hidden: int, *, std: float) -> nn.Module:
        """Embedding table sliced over the vocabulary: ids [b, s] -> [b, s, h]."""
        layer = tensor_parallel.VocabParallelEmbedding(size, hidden, init_method=None, config=self.config,
                                                       tp_group=self.group)
        plan_parameter(layer.weight, std=std, slice_dim=0)
        return layer

    def shared(self, parameter: Tensor) -> Tensor:
        """A parameter that every tensor rank holds in full, used on sequence-sliced activations."""
        return _SumGradientOverTensorAxis.apply(parameter, self.group) if self.sequence else parameter

    def enter(self, x: Tensor) -> Tensor:
        """[s, b, h] equal on all tensor ranks -> [s/t, b, h] under sequence parallelism, else unchanged."""
        return tensor_parallel.scatter_to_sequence_parallel_region(x, group=self.group) if self.sequence else x

    def leave(self, x: Tensor) -> Tensor:
        """[s(/t), b, h] -> [s, b, h] for what every tensor rank computes alike; backward takes this rank's part."""
        if not self.sequence:
            return x
        return tensor_parallel.gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=False,
                                                                    group=self.group)

    def leave_for_columns(self, x: Tensor) -> Tensor:
        """[s(/t), b, h] -> [s, b, h] as input of a column-sliced product; backward sums over the tensor axis."""
        if self.sequence:
            return tensor_parallel.gather_from_sequence_parallel_region(x, group=self.group)
        return self.whole_for_columns(x)

    def leave_whole(self, x: Tensor) -> Tensor:
        """[s(/t), b, h] -> [s, b, h] for what every tensor rank computes in full; its gradient is not summed."""
        if self.sequence:
            return tensor_parallel.gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=False,
                                                                        group=self.group)
        return x

    def whole_for_columns(self, x: Tensor) -> Tensor:
        """x equal on all tensor ranks, as input of a column-sliced product; backward sums over the tensor axis."""
        # megatron-core's own region sums a copy of a gradient that is not contiguous, and hands on what came in
        return _SumGradientOverTensorAxis.apply(x, self.group) if self.size > 1 else x

    def reduce_rows(self, x: Tensor) -> Tensor:
        """Partial sums [s, b, h] of row-sliced products -> their sum over the tensor axis, [s(/t), b, h]."""
        if self.sequence:
            return tensor_parallel.reduce_scatter_to_sequence_parallel_region(x, group=self.group)
        return tensor_parallel.reduce_from_tensor_model_parallel_region(x, group=self.group) if self.size > 1 else x

    def full_length(self, x: Tensor) -> int:
        """Length of the whole sequence of which x [s(/t), b, h] is here."""
        return x.shape[0] * (self.size if self.sequence else 1) * self.context.size

    def gather_columns(self, x: Tensor) -> Tensor:
        """[.., n/t] -> [.., n] on every tensor rank, without gradient (megatron-core's own gather needs CUDA)."""
        if self.size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), group=self.group)  # tensor group: it holds the column slices
        return torch.cat(parts, dim=-1)

    def cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Loss per target in fp32: logits [s, b, v/t], targets int64 [s, b] -> [s, b]."""
        logits = logits.float()
        if self.size == 1:
            return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none").view_as(targets)
        return tensor_parallel.vocab_parallel_cross_entropy(logits, targets)
