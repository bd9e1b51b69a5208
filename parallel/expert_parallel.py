"""Experts of a mixture spread over ranks: stacked matrices, and dispatch and combine of tokens.

The experts of a layer are divided among the ranks of the expert axis, which are neighbours along dp; each expert is
also sliced over the tensor axis like any feed-forward part. Shapes: T tokens, k choices of each, h hidden, e experts on
this rank, n rows that this rank's experts work on, t tensor degree.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.parameter_plan import Stack, plan_parameter
from parallel.tensor_parallel import TensorParallel


class ExpertParallel:
    """The expert axis as a layer of experts sees it: which experts are on this rank, and the group that holds all."""

    def __init__(self, num_experts: int, tp: TensorParallel):
        groups = tp.groups
        self.tp, self.num_experts = tp, num_experts
        self.size = groups.layout.expert if groups else 1
        self.group = groups.expert if groups else None
        count = num_experts // self.size
        first = groups.coordinates.dp % self.size * count if groups else 0
        self.here = range(first, first + count)

    def column(self, size_in: int, size_out: int, *, bias: bool, std: float) -> GroupedLinear:
        """A matrix for each expert, output dim sliced over the tensor axis: [n, in] -> [n, out/t]."""
        return GroupedLinear(self, size_in, size_out, bias=bias, std=std, slice_dim=0)

    def row(self, size_in: int, size_out: int, *, bias: bool, std: float) -> GroupedLinear:
        """A matrix for each expert, input dim sliced: [n, in/t] -> [n, out], a partial sum over the tensor axis."""
        return GroupedLinear(self, size_in, size_out, bias=bias, std=std, slice_dim=1)


class GroupedLinear(nn.Module):
    """One linear layer for each expert of this rank, `weight` [e, out, in]; by global name each is its own tensor."""

    def __init__(self, experts: ExpertParallel, size_in: int, size_out: int, *, bias: bool, std: float, slice_dim: int):
        super().__init__()
        self.tp, self.partial = experts.tp, slice_dim == 1
        sizes = [size_out, size_in]
        sizes[slice_dim] //= self.tp.size
        stack = Stack("experts", experts.here)
        self.weight = nn.Parameter(torch.empty(len(experts.here), *sizes, device=self.tp.device))
        plan_parameter(self.weight, std=std, slice_dim=slice_dim, stack=stack)
        self.bias = None
        if bias:
            self.bias = nn.Parameter(torch.empty(len(experts.here), sizes[0], device=self.tp.device))
            plan_parameter(self.bias, slice_dim=None if self.partial else 0, stack=stack)

    def forward(self, x: Tensor, counts: list[int]) -> Tensor:
        """x [n, in(/t)] sorted by expert, `counts` rows of each -> [n, out(/t)]."""
        bias: Tensor | None = self.bias
        if bias is not None and self.partial:  # each tensor rank adds its part: the sum over the ranks follows
            bias = self.tp.copy_to_ranks(bias) / self.tp.size
        return grouped_linear(x, self.weight, bias, counts)


def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None, counts: list[int]) -> Tensor:
    """x [n, in] sorted by expert, weight [e, out, in], bias [e, out] or None -> [n, out].

    One kernel for all experts where torch has it (bf16 on CUDA, sizes of 16 bytes), else one product for each.
    """
    if x.is_cuda and x.dtype == torch.bfloat16 and bias is None and not (weight.shape[1] % 8 or weight.shape[2] % 8):
        return grouped_kernel(x, weight, counts)
    biases = [None] * len(weight) if bias is None else bias.unbind()
    parts = zip(x.split(counts), weight.unbind(), biases, strict=True)
    return torch.cat([F.linear(rows, matrix, vector) for rows, matrix, vector in parts])


def grouped_kernel(x: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
    """`grouped_linear` without bias as one kernel."""
    ends = torch.tensor(counts, device=x.device).cumsum(0, dtype=torch.int32)
    return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)


class Dispatch:
    """Dispatch of one micro-batch's tokens to their experts, and combine of the results.

    Rows are sorted by expert, so the result is deterministic: no two rows are added to the same place.
    """

    def __init__(self, chosen: Tensor, kept: Tensor | None, experts: ExpertParallel):
        """
        Args:
            chosen: int64 [T, k], the experts of each token.
            kept: bool [T, k], False where a choice is dropped; None where all are kept.
        """
        self.num_tokens, self.num_choices = chosen.shape
        self.group, self.spread = experts.group, experts.size > 1
        flat = chosen.t().flatten()  # place = choice * T + token
        if kept is not None:
            flat = flat.masked_fill(~kept.t().flatten(), experts.num_experts)  # sorted behind the last expert
        counts = torch.bincount(flat, minlength=experts.num_experts + 1)[: experts.num_experts]
        self.order = torch.argsort(flat, stable=True)[: int(counts.sum())]
        if self.spread:
            counts = self._exchange_counts(counts.view(experts.size, -1))
        self.counts: list[int] = counts.tolist()  # rows of each expert of this rank

    def _exchange_counts(self, sent: Tensor) -> Tensor:
        """sent [ep, e], rows that go to each expert of each rank -> [e], rows that come to each expert here."""
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent.contiguous(), group=self.group)  # expert group: who holds which experts
        self.sent, self.received = sent.sum(1).tolist(), received.sum(1).tolist()
        expert = torch.arange(sent.shape[1], device=sent.device).repeat(len(sent))
        # received rows are sorted by sender, then expert; the products need them sorted by expert
        self.by_expert = torch.argsort(expert.repeat_interleave(received.flatten()), stable=True)
        return received.sum(0)

    def dispatch(self, x: Tensor) -> Tensor:
        """Tokens [T, h] -> the rows of this rank's experts [n, h], sorted by expert."""
        rows = _Take.apply(x, self.order, self.num_choices)
        if not self.spread:
            return rows
        rows = _AllToAll.apply(rows, self.sent, self.received, self.group)
        return _Take.apply(rows, self.by_expert, 1)

    def combine(self, y: Tensor) -> Tensor:
        """Rows [n, h] -> [k, T, h], the output for each choice of a token; zeros where the choice was dropped."""
        if self.spread:
            y = _Put.apply(y, self.by_expert, len(self.by_expert))
            y = _AllToAll.apply(y, self.received, self.sent, self.group)
        y = _Put.apply(y, self.order, self.num_choices * self.num_tokens)
        return y.view(self.num_choices, self.num_tokens, y.shape[1])


class _Take(torch.autograd.Function):
    """Rows of x [T, h] at places of its k copies, each place at most once; backward sums over the copies."""

    @staticmethod
    def forward(ctx, x: Tensor, places: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(places)
        ctx.length, ctx.copies = len(x), copies
        return x[places % len(x)] if copies > 1 else x[places]

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (places,) = ctx.saved_tensors
        whole = _put(gradient, places, ctx.copies * ctx.length)
        return whole.view(ctx.copies, ctx.length, gradient.shape[1]).sum(0), None, None


class _Put(torch.autograd.Function):
    """Rows at their places in [length, h], zeros elsewhere: the inverse of `_Take`."""

    @staticmethod
    def forward(ctx, rows: Tensor, places: Tensor, length: int) -> Tensor:
        ctx.save_for_backward(places)
        return _put(rows, places, length)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (places,) = ctx.saved_tensors
        return gradient[places], None, None


def _put(rows: Tensor, places: Tensor, length: int) -> Tensor:
    whole = rows.new_zeros(length, rows.shape[1])
    whole[places] = rows
    return whole


class _AllToAll(torch.autograd.Function):
    """`sent[r]` rows go to rank r of the group, `received[r]` come from it; backward sends gradients back."""

    @staticmethod
    def forward(ctx, x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _all_to_all(x, sent, received, group)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return _all_to_all(gradient, ctx.received, ctx.sent, ctx.group), None, None, None


def _all_to_all(x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    rows = x.new_empty(sum(received), x.shape[1])
    dist.all_to_all_single(rows, x.contiguous(), received, sent, group=group)  # expert group: it holds the experts
    return rows
