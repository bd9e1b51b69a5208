"""The BERT family as one ordered list of layers. Shapes as in pretrain/models/blocks.py; p predictions in a sample.

The state is (x, positions to predict [b, p], mask of the tokens); the mask, int64 [b, s], is there only where samples
may be filled up.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.parameter_plan import plan_parameter
from parallel.pipeline_stages import LayerSpec
from parallel.tensor_parallel import TensorParallel
from pretrain.models.bert.spec import BERTConfig
from pretrain.models.blocks import Block, BlockShape, Norm, seen
from pretrain.models.feed_forward import ACTIVATIONS
from pretrain.models.vocabulary import Embedding, Logits, PositionedInput, lookup_cost

State = tuple[Tensor, ...]


def layers(config: BERTConfig, tp: TensorParallel) -> list[LayerSpec]:
    """Input: (ids, segment types [b, s], positions [b, p]) and maybe a mask [b, s].

    Output: logits of the positions [p, b, v/t], and with `next_sentence` beside them the scores [b, 2] of the pair.
    """
    shape = block_shape(config)
    table = partial(Embedding, config, tp, config.init_std)
    specs = [LayerSpec("embedding", table, cost=lookup_cost(config.hidden)),
             LayerSpec("input", partial(Input, config, tp), cost=0.0)]
    for index in range(config.layers):
        name = f"blocks.{index}"
        specs.append(LayerSpec(name, partial(EncoderBlock, shape, tp, name), recompute=True))
    head_cost = 0.15 * config.padded_vocab_size / (12 * config.hidden)
    specs.append(LayerSpec("head", partial(MaskedHead, config, tp), cost=head_cost, tied_to="embedding",
                           vocabulary=True))
    return specs


def block_shape(config: BERTConfig) -> BlockShape:
    """A BERT config in the words of the shared block."""
    return BlockShape(
        hidden=config.hidden, heads=config.heads, kv_heads=config.heads, ffn=config.ffn_hidden, norm="layernorm",
        norm_position="post", norm_epsilon=config.norm_epsilon, activation=config.activation, bias=True,
        dropout=config.dropout, attention_dropout=config.attention_dropout, std=config.init_std,
        residual_std=config.init_std,
    )


class Input(PositionedInput):
    """Positions, segment types and norm."""

    def __init__(self, config: BERTConfig, tp: TensorParallel):
        super().__init__(config.num_positions, config.position_offset, config.hidden, config.init_std,
                         config.norm_epsilon, config.dropout, tp, config.segment_types)

    def forward(self, state: State) -> State:
        x, types, *rest = state
        return (self.enter(x, types), *rest)


class EncoderBlock(Block):
    """A block in which every token sees every other."""

    def __init__(self, shape: BlockShape, tp: TensorParallel, name: str):
        super().__init__(shape, tp, name, causal=False)

    def forward(self, state: State) -> State:
        x, positions, *mask = state
        return (super().forward(x, mask=seen(mask[0]) if mask else None), positions, *mask)


class Dense(nn.Module):
    """A linear layer that every tensor rank holds and computes in full."""

    def __init__(self, size_in: int, size_out: int, std: float, tp: TensorParallel):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size_out, size_in, device=tp.device))
        self.bias = nn.Parameter(torch.empty(size_out, device=tp.device))
        plan_parameter(self.weight, std=std)
        plan_parameter(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class MaskedHead(Logits):
    """Logits (or losses) of the positions that are asked for, and the judgement of the pair from the first token."""

    def __init__(self, config: BERTConfig, tp: TensorParallel):
        super().__init__(config, tp, std=None, bias=True)
        self.tp, self.activation = tp, ACTIVATIONS[config.activation]
        self.dense = Dense(config.hidden, config.hidden, config.init_std, tp)
        self.norm = Norm("layernorm", config.hidden, config.norm_epsilon, tp, sliced=False)
        self.pooler = self.judge = None
        if config.next_sentence:
            self.pooler = Dense(config.hidden, config.hidden, config.init_std, tp)
            self.judge = Dense(config.hidden, 2, config.init_std, tp)

    def forward(self, state: State, tied: Embedding, cross_entropy: Callable[..., Tensor] | None = None
                ) -> Tensor | tuple[Tensor, Tensor]:
        x, positions = state[:2]
        x = self.tp.gather_sequence(x)  # [s, b, h], and the few tokens that matter are computed by every tensor rank
        index = positions.transpose(0, 1)[..., None].expand(-1, -1, x.shape[-1])
        chosen = self.norm(self.activation(self.dense(x.gather(0, index))))
        if cross_entropy is None:
            chosen = self.tp.copy_to_ranks(chosen)
        found = self.over(chosen, tied, cross_entropy)
        if self.judge is None:
            return found
        return found, self.judge(torch.tanh(self.pooler(x[0])))
