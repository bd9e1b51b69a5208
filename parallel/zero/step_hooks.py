"""What happens around the optimizer's step that no library does for us: gradient norm, clipping, bounds of weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from common.errors import NotFinite
from parallel.process_groups import Groups
from parallel.zero.optimizer_state import StateView


class StepHooks:
    """Wraps the `step` methods of DeepSpeed's optimizer and of the AdamW inside it.

    Every path of DeepSpeed (plain or pipeline engine, any ZeRO stage, any type) ends in these two calls, and in no
    other common place. In order:

    1. before DeepSpeed's step: the global gradient norm, and clipping by it;
    2. DeepSpeed's step, inside it AdamW's on the fp32 weights;
    3. after AdamW's step, before DeepSpeed copies the weights out: planned upper bounds of weights.

    `grad_norm` is the norm of the last step, before clipping. Wrapped when it is made, once for an engine.
    """

    def __init__(self, engine, state: StateView, groups: Groups, clip_norm: float, *,
                 is_counted: Callable[[str], bool], max_values: dict[str, float], is_replicated: bool):
        """
        Args:
            engine: DeepSpeed's engine.
            clip_norm: largest global gradient norm, 0 for no clipping.
            is_counted: by the global name of a tensor, whether this rank's piece of it counts (others hold a copy).
            max_values: upper bounds of weights by global name.
            is_replicated: ZeRO is off, so that the replicas hold equal gradients.
        """
        self.engine, self.state, self.clip_norm = engine, state, clip_norm
        self.is_counted = is_counted
        # With ZeRO off only the parts of one model are summed (tp x ep x pp); else every rank holds pieces of its own.
        self.group = groups.model if is_replicated else None
        self.grad_norm = torch.zeros(())
        self.bounded = [(fragment.tensor, max_values[fragment.name]) for fragment in state.fragments("weight")
                        if fragment.name in max_values]
        self._wrap()

    def _wrap(self) -> None:
        whole_step, adam_step = self.engine.optimizer.step, self.state.base.step

        def clip_and_step(*args, **kwargs):
            self.clip()
            return whole_step(*args, **kwargs)

        def step_and_bound(*args, **kwargs):
            result = adam_step(*args, **kwargs)
            self.bound()
            return result

        if self.bounded:  # first: at stage 0 both are the same method
            self.state.base.step = step_and_bound  # type: ignore[method-assign]  # on purpose: see the class
            whole_step = self.engine.optimizer.step
        self.engine.optimizer.step = clip_and_step

    @torch.no_grad()
    def clip(self) -> None:
        """Global L2 norm with every parameter counted once, then scale so that it is at most `clip_norm`.

        A tensor-sliced parameter counts on each tensor rank, a full one on the first; an expert where it is, the rest
        on the first of the expert group; a tied copy not at all; ZeRO pieces on the rank that holds them.

        Raises:
            NotFinite: the norm is NaN or infinite outside fp16 (the same on every rank).
        """
        gradients = list(self.state.gradients())
        counted = [g.tensor for g in gradients if self.is_counted(g.name)]
        self.grad_norm = (self._sum_of_squares(counted).sqrt() / self.loss_scale()).float()
        norm = float(self.grad_norm)
        if not norm < float("inf"):
            if self.engine.fp16_enabled():
                return  # DeepSpeed sees the overflow too, skips the update and lowers the scale
            raise NotFinite(f"the gradient norm is {norm}")
        if self.clip_norm and norm > self.clip_norm and gradients:
            torch._foreach_mul_([g.tensor for g in gradients], self.clip_norm / (norm + 1e-6))

    def _sum_of_squares(self, tensors: list[Tensor]) -> Tensor:
        square = torch.zeros((), dtype=torch.float64, device=self.engine.device)
        if tensors:
            norms = torch.stack(torch._foreach_norm(tensors))
            square = norms.double().square().sum().to(square.device)  # from the host, with offload
        dist.all_reduce(square, group=self.group)  # group: see __init__
        return square

    @torch.no_grad()
    def bound(self) -> None:
        """Hold the fp32 weights that have a planned maximum at or below it."""
        for weights, max_value in self.bounded:
            weights.clamp_(max=max_value)

    def loss_scale(self) -> float:
        """What DeepSpeed multiplies the loss with before the backward: above 1 in fp16 only."""
        return float(getattr(self.engine.optimizer, "loss_scale", 1.0) or 1.0)
