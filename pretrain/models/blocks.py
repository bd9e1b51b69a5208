"""Parts of transformer blocks that every family uses, over the layers of parallel/tensor_parallel.py.

Shapes: s the part of the sequence that this context rank holds (s/t inside a sequence-parallel region), b micro-batch,
h hidden, g key-value heads on this tensor rank, d head dim, t tensor degree. Activations between layers are
[s, b, h], since megatron-core's regions split dim 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.parameter_plan import Std, plan_parameter
from parallel.random_streams import dropout
from parallel.recompute import Recomputable
from parallel.tensor_parallel import TensorParallel
from pretrain.models.attention import attention
from pretrain.models.feed_forward import FeedForward, Mixture
from pretrain.models.shapes import BlockShape


@dataclass
class Cache:
    """Keys and values of earlier tokens for each attention layer; the first `length` are valid."""

    max_tokens: int
    length: int = 0
    entries: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def extend(self, layer: str, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k and v [b, g, s, d] of the new tokens; returns those of all tokens up to now."""
        if layer not in self.entries:
            b, g, _, d = k.shape
            self.entries[layer] = (k.new_zeros(b, g, self.max_tokens, d), v.new_zeros(b, g, self.max_tokens, d))
        keys, values = self.entries[layer]
        end = self.length + k.shape[2]
        keys[:, :, self.length : end], values[:, :, self.length : end] = k, v
        return keys[:, :, :end], values[:, :, :end]


class Norm(nn.Module):
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang & Sennrich 2019, eq. 4) over the last dim, whole on each rank.

    sliced: whether its input is sliced along the sequence under sequence parallelism.
    """

    def __init__(self, kind: str, hidden: int, epsilon: float, tp: TensorParallel, *, sliced: bool = True):
        super().__init__()
        self.kind, self.epsilon = kind, epsilon
        self.shared = tp.shared if sliced else (lambda parameter: parameter)
        self.weight = nn.Parameter(torch.empty(hidden, device=tp.device))
        plan_parameter(self.weight, mean=1.0)
        self.bias = None
        if kind == "layernorm":
            self.bias = nn.Parameter(torch.empty(hidden, device=tp.device))
            plan_parameter(self.bias)

    def forward(self, x: Tensor) -> Tensor:  # [.., h] -> [.., h]
        weight = self.shared(self.weight)
        if self.bias is None:
            return F.rms_norm(x, (x.shape[-1],), weight, self.epsilon)
        return F.layer_norm(x, (x.shape[-1],), weight, self.shared(self.bias), self.epsilon)


class Rotary:
    """Rotary position embedding (Su et al. 2021, eq. 34), in the half-split arrangement that Llama uses.

    Tables are fp32 and live outside the module's buffers, so no mixed-precision cast can reach them.
    """

    def __init__(self, head_dim: int, base: float):
        self.head_dim, self.base = head_dim, base
        self._table: tuple[Tensor, Tensor] | None = None

    def table(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin, each [length, d], for positions 0 .. length - 1."""
        if self._table is None or self._table[0].shape[0] < length or self._table[0].device != device:
            exponent = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=device) / self.head_dim
            angle = torch.outer(torch.arange(length, dtype=torch.float32, device=device), self.base**-exponent)
            angle = torch.cat((angle, angle), dim=-1)
            self._table = (angle.cos(), angle.sin())
        return self._table[0][:length], self._table[1][:length]

    def __call__(self, x: Tensor, offset: int) -> Tensor:  # [b, heads, s, d], first token at position `offset`
        cos, sin = (t[offset:].to(x.dtype) for t in self.table(offset + x.shape[2], x.device))
        low, high = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-high, low), dim=-1) * sin


class SelfAttention(Recomputable):
    """Multi-head (Vaswani et al. 2017, section 3.2) or grouped-query (Ainslie et al. 2023) attention, heads over tp.

    The fused projection is laid out by key-value group, [q .. q k v], so that a contiguous slice of its output dim
    holds whole groups on any tensor degree. Over context ranks, each attends over the whole sequence with a part of the
    groups.
    """

    def __init__(self, shape: BlockShape, tp: TensorParallel, name: str, causal: bool, *,
                 num_keys: int | None = None):
        """num_keys: number of tokens from the first that are attended to; the rest is padding. None: all."""
        super().__init__()
        self.shape, self.tp, self.name, self.causal, self.num_keys = shape, tp, name, causal, num_keys
        self.head_dim = shape.head_dim
        self.per_group = shape.heads // shape.kv_heads
        size = (shape.heads + 2 * shape.kv_heads) * self.head_dim
        std: Std = shape.std
        if shape.query_std is not None:
            std = ((self.per_group * self.head_dim, shape.query_std), (2 * self.head_dim, shape.std))
        self.qkv = tp.column(shape.hidden, size, bias=shape.bias, std=std)
        self.out = tp.row(shape.heads * self.head_dim, shape.hidden, bias=shape.bias, std=shape.residual_std)
        self.rotary = Rotary(self.head_dim, shape.rotary_base) if shape.rotary_base else None

    def forward(self, x: Tensor, cache: Cache | None = None, mask: Tensor | None = None) -> Tensor:
        """x [s(/t), b, h] -> same; `mask` as in `attention`."""
        qkv = self.tp.context.to_heads(self.qkv(x))
        return self.out(self.tp.context.to_sequence(self.recompute(self._attend, qkv, cache, mask)))

    def _attend(self, qkv: Tensor, cache: Cache | None, mask: Tensor | None) -> Tensor:
        """From projection to projection, whole sequences: [s, b, g * (per_group + 2) * d] -> [s, b, heads * d]."""
        s, b, _ = qkv.shape
        qkv = qkv.view(s, b, -1, self.per_group + 2, self.head_dim)
        qkv = qkv.permute(1, 2, 3, 0, 4)  # [b, g, per_group + 2, s, d]
        q, k, v = qkv[:, :, :-2].reshape(b, -1, s, self.head_dim), qkv[:, :, -2], qkv[:, :, -1]
        if self.rotary:
            offset = cache.length if cache else 0
            q, k = self.rotary(q, offset), self.rotary(k, offset)
        if cache:
            k, v = cache.extend(self.name, k, v)
        if self.num_keys and self.num_keys < k.shape[2]:
            k, v = k[:, :, : self.num_keys], v[:, :, : self.num_keys]
        causal = self.causal and q.shape[2] > 1  # a single new token sees every earlier one
        y = attention(q, k, v, causal=causal, probability=self.shape.attention_dropout if self.training else 0.0,
                      tp=self.tp, mask=mask, scale=self.shape.attention_scale)
        return y.permute(2, 0, 1, 3).reshape(s, b, -1)


class CrossAttention(Recomputable):
    """Attention from the decoder's tokens to the encoder's output (Vaswani et al. 2017, section 3.2.3), heads over tp.

    Keys and values are fused by head, [k v], for the same reason as in SelfAttention.
    """

    def __init__(self, shape: BlockShape, tp: TensorParallel):
        super().__init__()
        self.shape, self.tp, self.head_dim = shape, tp, shape.head_dim
        size = shape.heads * self.head_dim
        query_std = shape.std if shape.query_std is None else shape.query_std
        self.q = tp.column(shape.hidden, size, bias=shape.bias, std=query_std)
        self.kv = tp.column(shape.hidden, 2 * size, bias=shape.bias, std=shape.std)
        self.out = tp.row(size, shape.hidden, bias=shape.bias, std=shape.residual_std)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [t(/tp), b, h] and the encoder's output [s(/tp), b, h] -> as x."""
        return self.out(self.recompute(self._attend, self.q(x), self.kv(memory), mask))

    def _attend(self, q: Tensor, kv: Tensor, mask: Tensor | None) -> Tensor:
        """From projection to projection: [t, b, heads * d] and [s, b, heads * 2 d] -> [t, b, heads * d]."""
        t, b, _ = q.shape
        q = q.view(t, b, -1, self.head_dim).permute(1, 2, 0, 3)
        kv = kv.view(kv.shape[0], b, -1, 2, self.head_dim).permute(1, 2, 3, 0, 4)  # [b, heads, 2, s, d]
        y = attention(q, kv[:, :, 0], kv[:, :, 1], causal=False, tp=self.tp, mask=mask,
                      probability=self.shape.attention_dropout if self.training else 0.0,
                      scale=self.shape.attention_scale)
        return y.permute(2, 0, 1, 3).reshape(t, b, -1)


def key_mask(mask: Tensor) -> Tensor:
    """Keys that attention may use: mask int64 [b, s], 1 for a token and 0 for padding -> bool [b, 1, 1, s]."""
    return (mask != 0)[:, None, None, :]


def causal_mask(length: int, device: torch.device) -> Tensor:
    """bool [length, length], True where the query of a row attends to the key of a column."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


class Block(nn.Module):
    """Attention and feed-forward with residuals; norms before (Radford et al. 2019) or after (Vaswani et al. 2017).

    A shape with cross-attention has attention to an encoder's output between the two. Each family's block opens its own
    state in `forward` and calls `transform`.
    """

    def __init__(self, shape: BlockShape, tp: TensorParallel, name: str, causal: bool, *, num_keys: int | None = None):
        super().__init__()
        self.pre, self.probability, self.tp = shape.norm_position == "pre", shape.dropout, tp
        self.attention_norm = Norm(shape.norm, shape.hidden, shape.norm_epsilon, tp)
        self.attention = SelfAttention(shape, tp, name, causal, num_keys=num_keys)
        if shape.has_cross_attention:
            self.cross_norm = Norm(shape.norm, shape.hidden, shape.norm_epsilon, tp)
            self.cross_attention = CrossAttention(shape, tp)
        self.feed_forward_norm = Norm(shape.norm, shape.hidden, shape.norm_epsilon, tp)
        self.feed_forward = Mixture(shape, shape.mixture, tp) if shape.mixture else FeedForward(shape, tp)

    def transform(self, x: Tensor, *, cache: Cache | None = None, mask: Tensor | None = None,
                  memory: Tensor | None = None, memory_mask: Tensor | None = None) -> Tensor:
        """x [s(/t), b, h] -> same. `memory` is the encoder's output; masks as in `attention`."""
        x = self._add(x, self.attention_norm, self.attention, cache, mask)
        if memory is not None:
            x = self._add(x, self.cross_norm, self.cross_attention, memory, memory_mask)
        return self._add(x, self.feed_forward_norm, self.feed_forward)

    def _add(self, x: Tensor, norm: Norm, layer: nn.Module, *arguments) -> Tensor:
        """The residual x plus the layer's output."""
        if self.pre:
            return x + self._drop(layer(norm(x), *arguments))
        return norm(x + self._drop(layer(x, *arguments)))

    def _drop(self, x: Tensor) -> Tensor:
        if self.training and self.probability:
            return dropout(x, self.probability, self.tp, sliced=self.tp.sequence)
        return x
