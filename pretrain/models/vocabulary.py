"""Both ends of every model on text: token table and logits. Shapes as in blocks.py; v is the padded vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.parameter_plan import plan_parameter
from parallel.random_streams import dropout
from parallel.tensor_parallel import TensorParallel
from pretrain.models.blocks import Norm
from pretrain.models.state import State


class VocabularyConfig(Protocol):
    """What the token table and the head read of a family's config."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def padded_vocab_size(self) -> int: ...

    @property
    def hidden(self) -> int: ...


class Embedding(nn.Module):
    """Token table, sliced over the vocabulary. `weight` is also what a tied head multiplies with.

    The ids are the first part of the state; the other parts are handed on.
    """

    def __init__(self, config: VocabularyConfig, tp: TensorParallel, std: float):
        super().__init__()
        self.table = tp.vocabulary(config.padded_vocab_size, config.hidden, std=std)

    @property
    def weight(self) -> Tensor:
        return self.table.weight

    def forward(self, state: State) -> State:  # ids [b, s] -> [b, s, h]
        if isinstance(state, tuple):
            return (self.table(state[0]), *state[1:])
        return self.table(state)


class Logits(nn.Module):
    """Products with this rank's slice of the token table, its own or a tied one; the padding never gets probability."""

    def __init__(self, config: VocabularyConfig, tp: TensorParallel, std: float | None, bias: bool = False):
        """With `std` None the table is tied: it comes with each call."""
        super().__init__()
        padded, slice_size = config.padded_vocab_size, config.padded_vocab_size // tp.size
        # columns of this tensor rank that stand for real tokens
        self.num_real = min(max(config.vocab_size - tp.rank * slice_size, 0), padded // tp.size)
        self.weight = self.bias = None
        if std is not None:
            self.weight = nn.Parameter(torch.empty(slice_size, config.hidden, device=tp.device))
            plan_parameter(self.weight, std=std, slice_dim=0)
        if bias:
            self.bias = nn.Parameter(torch.empty(slice_size, device=tp.device))
            plan_parameter(self.bias, slice_dim=0)

    def over(self, x: Tensor, tied: Embedding | None, cross_entropy: Callable[..., Tensor] | None = None) -> Tensor:
        """x [s, b, h], equal on all tensor ranks -> logits [s, b, v/t], or with `cross_entropy` losses [s, b].

        The gradient of x is summed over tensor ranks by x's own backward for logits, by `cross_entropy` for losses.
        """
        weight = self._table(tied).to(x.dtype)
        bias = self._bias(weight)
        if cross_entropy is not None:
            return cross_entropy(x, weight, bias)
        return F.linear(x, weight, bias)

    def _table(self, tied: Embedding | None) -> Tensor:
        if self.weight is not None:
            return self.weight
        if tied is None:
            raise ValueError("a head without a table of its own is called with the one that it is tied to")
        return tied.weight

    def _bias(self, weight: Tensor) -> Tensor | None:
        """The bias of this rank's columns, where those of the padding have the lowest number there is."""
        if self.num_real == weight.shape[0]:
            return self.bias
        padding = torch.arange(weight.shape[0], device=weight.device) >= self.num_real
        bias = weight.new_zeros(weight.shape[0]) if self.bias is None else self.bias
        return bias.masked_fill(padding, torch.finfo(weight.dtype).min)


class Head(Logits):
    """Logits of every token, or the losses of all labels. Only the first part of the state, x, is used."""

    def __init__(self, config: VocabularyConfig, tp: TensorParallel, std: float | None, scale: float = 1.0):
        super().__init__(config, tp, std)
        self.tp, self.scale = tp, scale

    def forward(self, state: State, tied: Embedding | None = None,
                cross_entropy: Callable[..., Tensor] | None = None) -> Tensor:
        x = state[0] if isinstance(state, tuple) else state  # [s(/t), b, h]
        x = self.tp.gather_for_columns(x) if cross_entropy is None else self.tp.gather_sequence(x)
        return self.over(x if self.scale == 1.0 else x * self.scale, tied, cross_entropy)


def entered(x: Tensor, tp: TensorParallel, probability: float) -> Tensor:
    """[b, s, h] -> [s(/t), b, h], with dropout where the probability is not 0."""
    # a slice of its own, or all of x would live as long as it does
    x = tp.scatter_sequence(x.transpose(0, 1)).contiguous()
    return dropout(x, probability, tp, sliced=tp.sequence) if probability else x


class PositionedInput(nn.Module):
    """Learned positions, a norm and dropout on the way from the token table to the blocks (as in BERT and BART)."""

    def __init__(self, tp: TensorParallel, hidden: int, *, num_positions: int, offset: int, std: float,
                 norm_epsilon: float, dropout: float, num_types: int = 0):
        """`offset` is the row of the first position; `num_types` is the number of segment types, 0 for none."""
        super().__init__()
        self.tp, self.offset, self.probability = tp, offset, dropout
        self.positions = nn.Parameter(torch.empty(num_positions, hidden, device=tp.device))
        plan_parameter(self.positions, std=std)
        self.types = None
        if num_types:
            self.types = nn.Parameter(torch.empty(num_types, hidden, device=tp.device))
            plan_parameter(self.types, std=std)
        self.norm = Norm("layernorm", hidden, norm_epsilon, tp)

    def enter(self, x: Tensor, types: Tensor | None = None) -> Tensor:
        """x [b, s, h] and the type of each token's segment [b, s] -> [s(/t), b, h]."""
        x = x.to(self.positions.dtype)  # a table of another layer is not cast with this one
        x = x + self.positions[self.offset : self.offset + x.shape[1]]
        if self.types is not None and types is not None:
            x = x + F.embedding(types, self.types)
        x = self.norm(entered(x, self.tp, 0.0))
        if self.training and self.probability:
            x = dropout(x, self.probability, self.tp, sliced=self.tp.sequence)
        return x
