"""Context parallelism: the sequence is shared out, and attention trades its part of it for a part of the heads.

DeepSpeed-Ulysses (Jacobs et al. 2023, arXiv 2309.14509, section 3.1) as an axis beside the tensor axis: an all-to-all
before attention and one after it, over the ranks that differ in the context index alone. Every tensor rank exchanges
the heads it holds, so heads must divide by tensor x context.

Shapes: s the whole sequence, c the context degree, b micro-batch, w what the heads of this tensor rank hold of a token,
laid out head by head (or group by group), so that w/c is whole ones.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class _AllToAll(torch.autograd.Function):
    """x [c, ..] -> [c, ..]: block i goes to context rank i and is replaced by the one it sends; its own inverse."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        received = torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.all_to_all_single(received, x.contiguous(), group=group)  # context group: it holds the whole sequence
        return received

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return _AllToAll.apply(gradient, ctx.group), None


class ContextParallel:
    """What a block and a loss need to know of the context axis; alone (the default) nothing is moved."""

    def __init__(self, group: dist.ProcessGroup | None = None, size: int = 1, rank: int = 0):
        self.group, self.size, self.rank = group, size, rank

    def first(self, length: int) -> int:
        """Position in the whole sequence of this rank's first token, each rank having `length` of them."""
        return self.rank * length

    def part(self, x: Tensor, dim: int = 1, overlap: int = 0) -> Tensor:
        """This rank's contiguous part of the sequence along `dim`, and the first `overlap` elements of the next."""
        if self.size == 1:
            return x
        length = (x.shape[dim] - overlap) // self.size
        return x.narrow(dim, self.first(length), length + overlap)

    def to_heads(self, x: Tensor) -> Tensor:
        """[s/c, b, w] of all heads -> [s, b, w/c], the whole sequence of a part of the heads."""
        if self.size == 1:
            return x
        return _AllToAll.apply(x.unflatten(-1, (self.size, -1)).permute(2, 0, 1, 3), self.group).flatten(0, 1)

    def to_sequence(self, x: Tensor) -> Tensor:
        """[s, b, w/c] of a part of the heads -> [s/c, b, w], this rank's part of the sequence of all heads."""
        if self.size == 1:
            return x
        received = _AllToAll.apply(x.unflatten(0, (self.size, -1)), self.group)  # [c, s/c, b, w/c]
        return received.permute(1, 2, 0, 3).flatten(2)
