"""Scaled dot-product attention over the heads of one tensor rank."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from common.seeding import derive
from parallel.tensor_parallel import TensorParallel


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, probability: float, tp: TensorParallel,
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
        torch.manual_seed(derive(base, tp.rank))
        return F.scaled_dot_product_attention(q, k, v, dropout_p=probability, **options)
