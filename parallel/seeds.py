"""Randomness inside the step, as a function of (seed, step, place in the layout): nothing to save, nothing to replay.

Ranks of one tensor group draw the same default stream, so dropout on activations they hold in full agrees; dropout on
activations sliced over the tensor axis draws from a stream of its own per tensor rank.
"""

from __future__ import annotations

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.megatron import Groups, TensorShard


def derive(seed: int, *purpose: object) -> int:
    """A 63-bit seed from SHA-256 of the run's seed and what it is for."""
    text = ":".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def seed_step(seed: int, step: int, groups: Groups) -> None:
    """Start the default stream of this step: equal along tp, different along cp, dp and pp."""
    at = groups.coordinates
    torch.manual_seed(derive(seed, "step", step, "cp", at.cp, "dp", at.dp, "pp", at.pp))


def dropout(x: Tensor, probability: float, shard: TensorShard, *, sliced: bool) -> Tensor:
    """Inverted dropout of x (any shape).

    The seed of the mask is itself drawn from the default CPU stream, which activation recompute restores, so a
    recomputed layer sees the same mask. `sliced` says that tensor ranks hold different parts of x.
    """
    base = int(torch.randint(2**62, ()))
    generator = torch.Generator(device=x.device).manual_seed(derive(base, shard.rank if sliced else 0))
    keep = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - probability, generator=generator)  # kept: a byte each
    return x * keep / (1 - probability)


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, probability: float, shard: TensorShard,
              mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Scaled dot-product attention over this tensor rank's heads: q [b, heads, s, d], k and v [b, kv_heads, s', d].

    Args:
        mask: [1 or b, 1 or heads, s, s'], bool (True: seen) or a bias that is added; it then says what is causal.
        scale: factor of the products; None for 1 / sqrt(d).
    """
    options = {"attn_mask": mask, "is_causal": causal and mask is None, "enable_gqa": q.shape[1] != k.shape[1],
               "scale": scale}
    if probability == 0.0:
        return F.scaled_dot_product_attention(q, k, v, **options)
    base = int(torch.randint(2**62, ()))
    devices = [q.device] if q.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):  # SDPA's dropout takes no generator; heads are sliced over tp
        torch.manual_seed(derive(base, shard.rank))
        return F.scaled_dot_product_attention(q, k, v, dropout_p=probability, **options)
