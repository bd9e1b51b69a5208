"""The GPT family as one ordered list of layers. Shapes as in pretrain/models/blocks.py; v is the padded vocabulary."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from parallel.parameter_plan import plan_parameter
from parallel.pipeline_stages import LayerSpec
from parallel.tensor_parallel import TensorParallel
from pretrain.models.blocks import Block, Cache, Norm, causal_mask
from pretrain.models.gpt.spec import SPEC, GPTConfig
from pretrain.models.state import State, handed_on, opened
from pretrain.models.vocabulary import Embedding, Head, entered


class DecoderState(NamedTuple):
    """Between the layers of a GPT."""

    x: Tensor  # ids int64 [b, s], their rows [b, s, h], then [s(/t), b, h]
    prefix: Tensor | None = None  # number of first tokens that see each other in both directions, int64 [b]


def layers(config: GPTConfig, tp: TensorParallel) -> list[LayerSpec]:
    """Embedding, positions, blocks, final norm (pre-norm only), head.

    Input: ids [b, s], or (ids, prefix int64 [b]) where the first tokens see each other in both directions; output:
    logits [s, b, v/t]. With context parallelism s is this rank's part of the sequence.
    """
    specs = [LayerSpec("embedding", partial(Embedding, config, tp, config.init_std)),
             LayerSpec("positions", partial(Positions, config, tp), cached=True)]
    for stack in SPEC.stacks(config):
        for name, shape in stack.named():
            specs.append(LayerSpec(name, partial(DecoderBlock, shape, tp, name, causal=True), recompute=True,
                                   cached=True))
    if config.norm_position == "pre":
        specs.append(LayerSpec("final_norm", partial(FinalNorm, config.norm, config.hidden, config.norm_epsilon, tp)))
    head = partial(Head, config, tp, None if config.tied_head else config.init_std)
    specs.append(LayerSpec("head", head, tied_to="embedding" if config.tied_head else None, vocabulary=True))
    return specs


class Positions(nn.Module):
    """Adds learned positions (where the config has them) and moves to [s, b, h], sliced under sequence parallelism."""

    def __init__(self, config: GPTConfig, tp: TensorParallel):
        super().__init__()
        self.tp, self.probability = tp, config.dropout
        self.weight = None
        if config.positions == "learned":
            self.weight = nn.Parameter(torch.empty(config.sequence_length, config.hidden, device=tp.device))
            plan_parameter(self.weight, std=config.init_std)

    def forward(self, state: State, cache: Cache | None = None) -> State:  # [b, s, h] -> [s(/t), b, h]
        x, prefix = opened(DecoderState, state)
        if self.weight is not None:
            begin = cache.length if cache else self.tp.context.first(x.shape[1])
            x = x + self.weight[begin : begin + x.shape[1]]
        x = entered(x, self.tp, self.probability if self.training else 0.0)
        return handed_on(DecoderState(x, prefix))


class DecoderBlock(Block):
    """A causal block. With a prefix, the first tokens see each other in both directions."""

    def forward(self, state: State, cache: Cache | None = None) -> State:  # [s(/t), b, h] -> same
        x, prefix = opened(DecoderState, state)
        if prefix is None:
            return self.transform(x, cache=cache)
        length = self.tp.full_length(x)
        inside = torch.arange(length, device=x.device) < prefix[:, None]  # [b, s]
        mask = causal_mask(length, x.device) | (inside[:, None, :] & inside[:, :, None])
        return handed_on(DecoderState(self.transform(x, mask=mask[:, None]), prefix))


class FinalNorm(Norm):
    """The norm after the last block of a pre-norm model; a prefix ends here."""

    def forward(self, state: State) -> Tensor:
        return super().forward(opened(DecoderState, state).x)
