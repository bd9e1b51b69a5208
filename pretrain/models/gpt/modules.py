"""The GPT family as one ordered list of layers. Shapes as in pretrain/models/blocks.py; v is the padded vocabulary."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from parallel.parameter_plan import plan_parameter
from parallel.pipeline_stages import LayerSpec
from parallel.tensor_parallel import TensorParallel
from pretrain.models.blocks import Block, BlockShape, Cache, Norm, causal_mask
from pretrain.models.feed_forward import of_block
from pretrain.models.gpt.spec import GPTConfig
from pretrain.models.vocabulary import Embedding, Head, entered, lookup_cost

State = Tensor | tuple[Tensor, Tensor]  # x, or x and the length of the prefix, int64 [b]


def layers(config: GPTConfig, tp: TensorParallel) -> list[LayerSpec]:
    """Embedding, positions, blocks, final norm (pre-norm only), head.

    Input: ids [b, s], or (ids, prefix int64 [b]) where the first tokens see each other in both directions; output:
    logits [s, b, v/t]. With context parallelism s is this rank's part of the sequence.
    """
    dense = block_shape(config)
    block_cost = 12 * config.hidden**2 + 2 * config.hidden * config.sequence_length  # multiply-adds per token, roughly
    table = partial(Embedding, config, tp, config.init_std)
    specs = [LayerSpec("embedding", table, cost=lookup_cost(config.hidden)),
             LayerSpec("positions", partial(Positions, config, tp), cost=0.0, cached=True)]
    for index in range(config.layers):
        name = f"blocks.{index}"
        shape, extra_cost = of_block(dense, config, index)
        block = partial(DecoderBlock, shape, tp, name, causal=True)
        specs.append(LayerSpec(name, block, cost=1 + extra_cost, recompute=True, cached=True))
    if config.norm_position == "pre":
        norm = partial(FinalNorm, config.norm, config.hidden, config.norm_epsilon, tp)
        specs.append(LayerSpec("final_norm", norm, cost=0.0))
    head_cost = config.hidden * config.padded_vocab_size / block_cost
    head = partial(Head, config, tp, None if config.tied_head else config.init_std)
    specs.append(LayerSpec("head", head, cost=head_cost, tied_to="embedding" if config.tied_head else None,
                           vocabulary=True))
    return specs


def block_shape(config: GPTConfig) -> BlockShape:
    """A GPT config in the words of the shared block."""
    return BlockShape(
        hidden=config.hidden, heads=config.heads, kv_heads=config.num_kv_heads, ffn=config.ffn_hidden,
        norm=config.norm, norm_position=config.norm_position, norm_epsilon=config.norm_epsilon,
        activation=config.activation, bias=config.bias, dropout=config.dropout,
        attention_dropout=config.attention_dropout, std=config.init_std,
        residual_std=BlockShape.scaled_residual(config.init_std, config.layers),
        rotary_base=config.rotary_base if config.positions == "rotary" else None,
    )


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
        x, prefix = _split(state)
        if self.weight is not None:
            begin = cache.length if cache else self.tp.context.first(x.shape[1])
            x = x + self.weight[begin : begin + x.shape[1]]
        x = entered(x, self.tp, self.probability if self.training else 0.0)
        return x if prefix is None else (x, prefix)


class DecoderBlock(Block):
    """A causal block. With a prefix, the first tokens see each other in both directions."""

    def forward(self, state: State, cache: Cache | None = None) -> State:  # [s(/t), b, h] -> same
        x, prefix = _split(state)
        if prefix is None:
            return super().forward(x, cache)
        length = self.tp.full_length(x)
        inside = torch.arange(length, device=x.device) < prefix[:, None]  # [b, s]
        mask = causal_mask(length, x.device) | (inside[:, None, :] & inside[:, :, None])
        return super().forward(x, mask=mask[:, None]), prefix


class FinalNorm(Norm):
    """The norm after the last block of a pre-norm model; a prefix ends here."""

    def forward(self, state: State) -> Tensor:
        return super().forward(_split(state)[0])


def _split(state: State) -> tuple[Tensor, Tensor | None]:
    return state if isinstance(state, tuple) else (state, None)
