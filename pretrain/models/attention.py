"""Scaled dot-product attention (Vaswani et al. 2017, eq. 1) over the heads of one tensor rank: every family's."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from common.seeding import derive
from parallel.tensor_parallel import TensorParallel


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, probability: float, tp: TensorParallel,
              mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """softmax(scale q k^T + mask) v for this tensor rank's heads: q [b, heads, s, d], k and v [b, kv_heads, s', d].

    Each key-value head serves heads / kv_heads queries' heads. The kernel is torch's.

    Args:
        causal: a query sees the keys up to its own position; without effect where there is a mask.
        probability: of dropout on the attention weights.
        tp: its rank seeds the dropout, since each tensor rank has other heads.
        mask: [1 or b, 1 or heads, s, s'], bool (True: the query sees the key) or a bias that is added to the products.
        scale: factor of the products of queries and keys; None for 1 / sqrt(d).

    Returns: [b, heads, s, d].
    """
    attend = partial(F.scaled_dot_product_attention, q, k, v, attn_mask=mask, is_causal=causal and mask is None,
                     enable_gqa=q.shape[1] != k.shape[1], scale=scale)
    if probability == 0.0:
        return attend()
    base = int(torch.randint(2**62, ()))
    devices = [q.device] if q.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):  # torch's dropout here takes no generator; heads are sliced over tp
        torch.manual_seed(derive(base, tp.rank))
        return attend(dropout_p=probability)
