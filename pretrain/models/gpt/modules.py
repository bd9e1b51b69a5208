"""The GPT family as one ordered list of layers. Shapes as in pretrain/models/blocks.py; v is the padded vocabulary."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.initialise import plan_parameter
from parallel.megatron import TensorShard
from parallel.pipeline import LayerSpec
from parallel.seeds import dropout
from pretrain.models.blocks import Block, BlockShape, Cache, Norm
from pretrain.models.gpt.spec import GPTConfig


def layers(config: GPTConfig, shard: TensorShard) -> list[LayerSpec]:
    """Embedding, positions, blocks, final norm (pre-norm only), head. Input: ids [b, s]; output: logits [s, b, v/t]."""
    shape = block_shape(config)
    block_cost = 12 * config.hidden**2 + 2 * config.hidden * config.sequence_length  # multiply-adds per token, roughly
    specs = [LayerSpec("embedding", partial(Embedding, config, shard), cost=0.0),
             LayerSpec("positions", partial(Positions, config, shard), cost=0.0, cached=True)]
    for index in range(config.layers):
        name = f"blocks.{index}"
        block = partial(Block, shape, shard, name, causal=True)
        specs.append(LayerSpec(name, block, cost=1.0, recompute=True, cached=True))
    if config.norm_position == "pre":
        norm = partial(Norm, config.norm, config.hidden, config.norm_epsilon, shard)
        specs.append(LayerSpec("final_norm", norm, cost=0.0))
    head_cost = config.hidden * config.padded_vocab_size / block_cost
    specs.append(LayerSpec("head", partial(Head, config, shard), cost=head_cost,
                           tied_to="embedding" if config.tied_head else None))
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


class Embedding(nn.Module):
    """Token table, sliced over the vocabulary. `weight` is also what a tied head multiplies with."""

    def __init__(self, config: GPTConfig, shard: TensorShard):
        super().__init__()
        self.table = shard.vocabulary(config.padded_vocab_size, config.hidden, std=config.init_std)

    @property
    def weight(self) -> Tensor:
        return self.table.weight

    def forward(self, ids: Tensor) -> Tensor:  # [b, s] -> [b, s, h]
        return self.table(ids)


class Positions(nn.Module):
    """Adds learned positions (where the config has them) and moves to [s, b, h], sliced under sequence parallelism."""

    def __init__(self, config: GPTConfig, shard: TensorShard):
        super().__init__()
        self.shard, self.probability = shard, config.dropout
        self.weight = None
        if config.positions == "learned":
            self.weight = nn.Parameter(torch.empty(config.sequence_length, config.hidden, device=shard.device))
            plan_parameter(self.weight, std=config.init_std)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:  # [b, s, h] -> [s(/t), b, h]
        if self.weight is not None:
            begin = cache.length if cache else 0
            x = x + self.weight[begin : begin + x.shape[1]]
        x = self.shard.enter(x.transpose(0, 1).contiguous())
        if self.training and self.probability:
            x = dropout(x, self.probability, self.shard, sliced=self.shard.sequence)
        return x


class Head(nn.Module):
    """Logits over this rank's slice of the vocabulary; tied to the embedding or with a matrix of its own."""

    def __init__(self, config: GPTConfig, shard: TensorShard):
        super().__init__()
        self.shard = shard
        padded, self.hidden = config.padded_vocab_size, config.hidden
        # columns of this tensor rank that stand for real tokens; the padding never gets probability
        self.num_real = min(max(config.vocab_size - shard.rank * (padded // shard.size), 0), padded // shard.size)
        self.weight = None
        if not config.tied_head:
            self.weight = nn.Parameter(torch.empty(padded // shard.size, config.hidden, device=shard.device))
            plan_parameter(self.weight, std=config.init_std, slice_dim=0)

    def forward(self, x: Tensor, embedding: Embedding | None = None) -> Tensor:  # [s(/t), b, h] -> [s, b, v/t]
        weight = embedding.weight if self.weight is None else self.weight
        logits = F.linear(self.shard.leave_for_columns(x), weight.to(x.dtype))
        if self.num_real < logits.shape[-1]:
            padding = torch.arange(logits.shape[-1], device=x.device) >= self.num_real
            logits = logits.masked_fill(padding, torch.finfo(logits.dtype).min)
        return logits
