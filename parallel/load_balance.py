"""Keeping experts evenly loaded: the auxiliary loss's way into the gradient, the selection bias, and what is reported.

A router calls `Balance.attach`; the engine finds every `Balance` of its stage, says how the step's losses are scaled,
and closes the step over all ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.process_groups import Groups

# What a router tells of a micro-batch behind the choices of each expert: sums over tokens, choices and sequences.
STATISTICS = ("tokens", "kept", "entropy", "sequences", "balance_loss", "z_loss")


class Balance(nn.Module):
    """What a router keeps beside its weight: the bias of the selection, and what it tells of the step so far.

    The bias (Wang et al. 2024, arXiv 2408.15664, algorithm 1) takes part in choosing experts and not in their weights.
    After each step it moves by `bias_rate` up for an expert that had less than the mean load of the global batch, down
    for one that had more. It is a buffer, saved with the weights.
    """

    bias: Tensor | None

    def __init__(self, num_experts: int, bias_rate: float, device: torch.device):
        super().__init__()
        self.num_experts, self.bias_rate = num_experts, bias_rate
        self.register_buffer("bias", torch.zeros(num_experts, device=device) if bias_rate else None)
        self.gradient_scale = 1.0
        self.totals: Tensor | None = None

    def attach(self, x: Tensor, loss: Tensor, load: Tensor, statistics: dict[str, Tensor]) -> Tensor:
        """x unchanged; its backward gives the auxiliary loss its gradient and counts the statistics, once per forward.

        Both happen in the backward, because a forward may run again to recompute activations. They happen in its first
        traversal only, because a graph may be traversed more than once: DeepSpeed's pipeline engine calls `backward`
        for each floating-point tensor that a stage sends on.

        Args:
            loss: scalar, the mean over this micro-batch's sequences, coefficients included.
            load: [experts], how many choices fell on each.
            statistics: scalars by the names of STATISTICS.
        """
        if not x.requires_grad:  # a frozen router counts as well: the backward has to come by
            x = x.detach().requires_grad_()
        told = torch.cat([load.double(), torch.stack([statistics[name].detach().double() for name in STATISTICS])])
        return _Attach.apply(x, loss, told, self)

    def shift(self, load: Tensor) -> None:
        """Move the bias after a step whose global batch put `load` [experts] on the experts."""
        if self.bias is not None:
            self.bias += self.bias_rate * torch.sign(load.mean() - load).to(self.bias)


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, loss: Tensor, told: Tensor, balance: Balance) -> Tensor:
        ctx.save_for_backward(told)
        ctx.balance, ctx.loss_type, ctx.is_counted = balance, loss.dtype, False
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        if ctx.is_counted:  # a further traversal of the same graph
            return gradient, None, None, None
        ctx.is_counted = True
        (told,) = ctx.saved_tensors
        balance = ctx.balance
        balance.totals = told if balance.totals is None else balance.totals + told
        return gradient, told.new_full((), balance.gradient_scale, dtype=ctx.loss_type), None, None


class Balances:
    """Every `Balance` of this rank's stage, and the step over all of them."""

    def __init__(self, stage: nn.Module, groups: Groups, device: torch.device):
        self.here = [module for module in stage.modules() if isinstance(module, Balance)]
        self.groups, self.device = groups, device
        num_experts = torch.tensor(max((b.num_experts for b in self.here), default=0), device=device)
        if groups.layout.pipeline > 1:  # a stage without routers takes part in reports, and must know their size
            dist.all_reduce(num_experts, op=dist.ReduceOp.MAX, group=groups.pipeline)
        self.num_experts = int(num_experts)

    def begin_step(self, gradient_scale: float) -> None:
        """`gradient_scale` turns the gradient of one micro-batch's mean into its share of the optimizer's."""
        for balance in self.here:
            balance.gradient_scale, balance.totals = gradient_scale, None

    @torch.no_grad()
    def end_step(self, taken: bool) -> dict[str, Any] | None:
        """Add up the step over all ranks and move the biases unless the step was skipped; None for a dense model.

        Returns: `balance_loss` and `z_loss` without their coefficients, `expert_load` (each expert's share of the
            choices), `dropped_fraction` and `router_entropy` (nats), all means over the layers; `expert_load_max`, the
            largest load of one expert in one layer as a multiple of an even share.
        """
        if not self.num_experts:
            return None
        width = self.num_experts + len(STATISTICS)
        rows = [balance.totals for balance in self.here if balance.totals is not None]
        totals = torch.stack(rows) if rows else torch.zeros(0, width, dtype=torch.float64, device=self.device)
        if self.groups.layout.data > 1:
            dist.all_reduce(totals, group=self.groups.data)  # data group: each rank routed its share of the batch
        load, rest = totals[:, : self.num_experts], totals[:, self.num_experts :]
        for balance, layer in zip(self.here, load, strict=True):
            if taken:
                balance.shift(layer)
        share = load / load.sum(1, keepdim=True)
        tokens, kept, entropy, sequences, balance_loss, z_loss = rest.unbind(1)
        means = torch.stack([1 - kept / load.sum(1), entropy / tokens, balance_loss / sequences, z_loss / sequences], 1)
        summary = torch.cat([share, means, torch.ones_like(means[:, :1])], 1).sum(0)
        largest = share.max() if len(share) else summary.new_zeros(())
        if self.groups.layout.pipeline > 1:  # pipeline group: each stage has its own layers
            dist.all_reduce(summary, group=self.groups.pipeline)
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.groups.pipeline)
        *shares, dropped, entropy, balance_loss, z_loss = (summary[:-1] / summary[-1]).tolist()
        return {"balance_loss": balance_loss, "z_loss": z_loss, "expert_load": shares,
                "expert_load_max": float(largest) * self.num_experts, "dropped_fraction": dropped,
                "router_entropy": entropy}
