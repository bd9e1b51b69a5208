"""Which numbers are kept in which type, in one place.

| `precision.compute` | ZeRO 0 | ZeRO 1, 2, 3 |
| --- | --- | --- |
| fp32 | fp32 everywhere | fp32 everywhere |
| bf16 | fp32 weights and gradients; cast on use below | DeepSpeed: bf16 weights, fp32 master weights and gradients |
| fp16 | refused | DeepSpeed: fp16 weights, fp32 master weights, dynamic loss scale |

Always fp32: the loss from the logits on, Adam's moments, the gradient norm, rotary tables, the products and
probabilities of a router of experts (its weight is not cast at ZeRO 0). parallel/README.md has the whole table.
Gradients travel between replicas in fp32, or in the compute type (`precision.reduce`).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.func import functional_call

from common.number_formats import NUMBER_FORMATS
from parallel.parameter_plan import plan_of

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, number.torch) for name, number in NUMBER_FORMATS.items()}


class CastOnUse(nn.Module):
    """A layer with fp32 parameters that computes in a lower type.

    DeepSpeed has no fp32 gradient accumulation for bf16 at ZeRO stage 0 (it raises on that mix of types). Here
    DeepSpeed sees an fp32 model; the cast is part of the graph, so gradients arrive, sum and reduce in fp32.
    """

    def __init__(self, layer: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.layer = layer
        self.dtype = dtype

    def forward(self, *state, **options):
        low = {name: p if plan_of(p).keep_fp32 else p.to(self.dtype) for name, p in self.layer.named_parameters()}
        return functional_call(self.layer, low, state, options)
