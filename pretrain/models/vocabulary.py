"""Both ends of every model on text: token table and logits. Shapes as in blocks.py; v is the padded vocabulary."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.initialise import plan_parameter
from parallel.megatron import TensorShard
from parallel.seeds import dropout
from pretrain.models.blocks import Norm
from pretrain.models.family import TextConfig


class Embedding(nn.Module):
    """Token table, sliced over the vocabulary. `weight` is also what a tied head multiplies with.

    The state may carry more beside the ids; that is handed on.
    """

    def __init__(self, config: TextConfig, shard: TensorShard, std: float):
        super().__init__()
        self.table = shard.vocabulary(config.padded_vocab_size, config.hidden, std=std)

    @property
    def weight(self) -> Tensor:
        return self.table.weight

    def forward(self, state: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:  # ids [b, s] -> [b, s, h]
        if isinstance(state, tuple):
            return (self.table(state[0]), *state[1:])
        return self.table(state)


class Logits(nn.Module):
    """Products with this rank's slice of the token table, its own or a tied one; the padding never gets probability."""

    def __init__(self, config: TextConfig, shard: TensorShard, std: float | None, bias: bool = False):
        """With `std` None the table is tied: it comes with each call."""
        super().__init__()
        padded, slice_size = config.padded_vocab_size, config.padded_vocab_size // shard.size
        # columns of this tensor rank that stand for real tokens
        self.num_real = min(max(config.vocab_size - shard.rank * slice_size, 0), padded // shard.size)
        self.weight = self.bias = None
        if std is not None:
            self.weight = nn.Parameter(torch.empty(slice_size, config.hidden, device=shard.device))
            plan_parameter(self.weight, std=std, slice_dim=0)
        if bias:
            self.bias = nn.Parameter(torch.empty(slice_size, device=shard.device))
            plan_parameter(self.bias, slice_dim=0)

    def logits(self, x: Tensor, tied: Embedding | None) -> Tensor:
        """x [s, b, h], equal on all tensor ranks with a backward that sums over them -> [s, b, v/t]."""
        weight = tied.weight if self.weight is None else self.weight
        logits = F.linear(x, weight.to(x.dtype), self.bias)
        if self.num_real < logits.shape[-1]:
            padding = torch.arange(logits.shape[-1], device=x.device) >= self.num_real
            logits = logits.masked_fill(padding, torch.finfo(logits.dtype).min)
        return logits


class Head(Logits):
    """Logits of every token. What the state carries beside x ends here."""

    def __init__(self, config: TextConfig, shard: TensorShard, std: float | None, scale: float = 1.0):
        super().__init__(config, shard, std)
        self.shard, self.scale = shard, scale

    def forward(self, state: Tensor | tuple[Tensor, ...], tied: Embedding | None = None) -> Tensor:
        x = state[0] if isinstance(state, tuple) else state  # [s(/t), b, h] -> [s, b, v/t]
        x = self.shard.leave_for_columns(x)
        return self.logits(x if self.scale == 1.0 else x * self.scale, tied)


def entered(x: Tensor, shard: TensorShard, probability: float) -> Tensor:
    """[b, s, h] -> [s(/t), b, h], with dropout where the probability is not 0."""
    x = shard.enter(x.transpose(0, 1).contiguous())
    return dropout(x, probability, shard, sliced=shard.sequence) if probability else x


class PositionedInput(nn.Module):
    """Learned positions, a norm and dropout on the way from the token table to the blocks (as in BERT and BART)."""

    def __init__(self, num_positions: int, offset: int, hidden: int, std: float, norm_epsilon: float, dropout: float,
                 shard: TensorShard, num_types: int = 0):
        """`offset` is the row of the first position; `num_types` kinds of segments add a row each."""
        super().__init__()
        self.shard, self.offset, self.probability = shard, offset, dropout
        self.positions = nn.Parameter(torch.empty(num_positions, hidden, device=shard.device))
        plan_parameter(self.positions, std=std)
        self.types = None
        if num_types:
            self.types = nn.Parameter(torch.empty(num_types, hidden, device=shard.device))
            plan_parameter(self.types, std=std)
        self.norm = Norm("layernorm", hidden, norm_epsilon, shard)

    def enter(self, x: Tensor, types: Tensor | None = None) -> Tensor:
        """x [b, s, h] and the type of each token's segment [b, s] -> [s(/t), b, h]."""
        x = x + self.positions[self.offset : self.offset + x.shape[1]]
        if self.types is not None:
            x = x + F.embedding(types, self.types)
        x = self.norm(entered(x, self.shard, 0.0))
        if self.training and self.probability:
            x = dropout(x, self.probability, self.shard, sliced=self.shard.sequence)
        return x
