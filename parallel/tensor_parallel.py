"""Tensor-parallel layers and regions, from megatron-core.

Tensor shapes in this file: s the part of the sequence that this context rank holds, b micro-batch, h hidden,
v vocabulary; t is the tensor-parallel degree.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.context_parallel import ContextParallel
from parallel.eager_imports import eager_imports
from parallel.parameter_plan import Std, plan_parameter
from parallel.process_groups import Groups

with eager_imports():
    from megatron.core import tensor_parallel
    from megatron.core.model_parallel_config import ModelParallelConfig


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

    def __init__(self, *args, tp: TensorParallel, **kwargs):
        super().__init__(*args, input_is_parallel=True, skip_bias_add=True, **kwargs)
        self.tp = tp

    def _forward_impl(self, input, weight, *args, **kwargs):
        if self.tp_group.size() == 1:
            # skip_bias_add keeps the bias away from megatron-core; alone we can fuse it.
            return F.linear(input, weight, self.bias)
        return super()._forward_impl(input, weight, *args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:  # [s, b, in/t] -> [s(/t), b, out]
        output, bias = super().forward(x)
        if bias is None or self.tp_group.size() == 1:
            return output
        return output + self.tp.shared(bias)


class VocabularyTable(Protocol):
    """An embedding table that is sliced over the vocabulary: ids [b, s] -> [b, s, h]."""

    weight: Tensor

    def __call__(self, ids: Tensor) -> Tensor: ...


class TensorParallel:
    """What a block needs to know of the tensor axis: makes parallel layers and moves activations between regions."""

    def __init__(self, groups: Groups | None, device: torch.device, dtype: torch.dtype = torch.float32):
        """With `groups` None the layers are those of a single rank (counting, generation before a group exists)."""
        self.groups = groups
        self.group = groups.tensor if groups else None
        self.size = groups.layout.tensor if groups else 1
        self.rank = groups.coordinates.tp if groups else 0
        self.sequence = bool(groups and groups.layout.sequence and self.size > 1)
        self.context = ContextParallel(groups.context, groups.layout.context, groups.coordinates.cp) if groups \
            else ContextParallel()
        self.device = device
        self.config = ModelParallelConfig(
            tensor_model_parallel_size=self.size,
            pipeline_model_parallel_size=groups.layout.pipeline if groups else 1,
            sequence_parallel=self.sequence,
            params_dtype=dtype,
            pipeline_dtype=dtype,
            use_cpu_initialization=device.type != "cuda",
            perform_initialization=False,  # parallel/parameter_plan.py draws every weight from its global name
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
                           tp_group=self.group, tp=self)
        plan_parameter(layer.weight, std=std, slice_dim=1)
        if bias:
            plan_parameter(layer.bias)
        return layer

    def vocabulary(self, size: int, hidden: int, *, std: float) -> VocabularyTable:
        """Embedding table sliced over the vocabulary: ids [b, s] -> [b, s, h]."""
        layer = tensor_parallel.VocabParallelEmbedding(size, hidden, init_method=None, config=self.config,
                                                       tp_group=self.group)
        plan_parameter(layer.weight, std=std, slice_dim=0)
        return layer

    def shared(self, parameter: Tensor) -> Tensor:
        """A parameter that every tensor rank holds in full, used on sequence-sliced activations."""
        return _SumGradientOverTensorAxis.apply(parameter, self.group) if self.sequence else parameter

    def scatter_sequence(self, x: Tensor) -> Tensor:
        """[s, b, h] equal on all tensor ranks -> [s/t, b, h] under sequence parallelism, else unchanged."""
        return tensor_parallel.scatter_to_sequence_parallel_region(x, group=self.group) if self.sequence else x

    def gather_sequence(self, x: Tensor) -> Tensor:
        """[s(/t), b, h] -> [s, b, h] for what every tensor rank computes alike; backward takes this rank's part."""
        if not self.sequence:
            return x
        return tensor_parallel.gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=False,
                                                                    group=self.group)

    def gather_for_columns(self, x: Tensor) -> Tensor:
        """[s(/t), b, h] -> [s, b, h] as input of a column-sliced product; backward sums over the tensor axis."""
        if self.sequence:
            return tensor_parallel.gather_from_sequence_parallel_region(x, group=self.group)
        return self.copy_to_ranks(x)

    def copy_to_ranks(self, x: Tensor) -> Tensor:
        """x equal on all tensor ranks, as input of a column-sliced product; backward sums over the tensor axis."""
        # megatron-core's own region sums a copy of a gradient that is not contiguous, and hands on what came in
        return _SumGradientOverTensorAxis.apply(x, self.group) if self.size > 1 else x

    def reduce_from_ranks(self, x: Tensor) -> Tensor:
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

    def cross_entropy(self, logits: Tensor, targets: Tensor, keep_logits: bool = False) -> Tensor:
        """Loss per target in fp32: logits [s, b, v/t], targets int64 [s, b] -> [s, b].

        megatron-core computes the softmax in the memory of fp32 logits. `keep_logits` gives it a copy, for logits that
        are used again; without it nothing may use them afterwards.
        """
        if self.size == 1:
            return F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), reduction="none").view_as(targets)
        logits = logits.to(torch.float32, copy=keep_logits)
        return tensor_parallel.vocab_parallel_cross_entropy(logits, targets)
