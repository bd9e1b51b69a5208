"""The BERT family as one ordered list of layers. Shapes as in pretrain/models/blocks.py; p predictions in a sample."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.parameter_plan import plan_parameter
from parallel.pipeline_stages import LayerSpec
from parallel.tensor_parallel import TensorParallel
from pretrain.models.bert.spec import SPEC, BERTConfig
from pretrain.models.blocks import Block, Norm, key_mask
from pretrain.models.feed_forward import ACTIVATIONS
from pretrain.models.shapes import BlockShape
from pretrain.models.state import State, handed_on, opened
from pretrain.models.vocabulary import Embedding, Logits, PositionedInput


def layers(config: BERTConfig, tp: TensorParallel) -> list[LayerSpec]:
    """Input: (ids, segment types [b, s], positions [b, p]) and maybe a mask [b, s].

    Output: logits of the positions [p, b, v/t], and with `next_sentence` beside them the scores [b, 2] of the pair.
    """
    (stack,) = SPEC.stacks(config)
    specs = [LayerSpec("embedding", partial(Embedding, config, tp, config.init_std)),
             LayerSpec("input", partial(Input, config, tp))]
    first = f"{stack.name}.0"
    specs += [LayerSpec(name, partial(EncoderBlock, shape, tp, name), recompute=True,
                        same_as=first if stack.shared and name != first else None) for name, shape in stack.named()]
    return [*specs, LayerSpec("head", partial(MaskedHead, config, tp), tied_to="embedding", vocabulary=True)]


class InputState(NamedTuple):
    """Before the blocks."""

    x: Tensor  # ids int64 [b, s], then their rows [b, s, h]
    types: Tensor  # of each token's segment, int64 [b, s]
    positions: Tensor  # to predict, int64 [b, p]
    mask: Tensor | None = None  # int64 [b, s], 0 for padding


class EncoderState(NamedTuple):
    """Between the blocks."""

    x: Tensor  # [s(/t), b, h]
    positions: Tensor  # to predict, int64 [b, p]
    mask: Tensor | None = None  # int64 [b, s], 0 for padding


class Input(PositionedInput):
    """Positions, segment types and norm."""

    def __init__(self, config: BERTConfig, tp: TensorParallel):
        super().__init__(tp, config.hidden, num_positions=config.num_positions, offset=config.position_offset,
                         std=config.init_std, norm_epsilon=config.norm_epsilon, dropout=config.dropout,
                         num_types=config.segment_types)

    def forward(self, state: State) -> State:
        x, types, positions, mask = opened(InputState, state)
        return handed_on(EncoderState(self.enter(x, types), positions, mask))


class EncoderBlock(Block):
    """A block in which every token sees every other."""

    def __init__(self, shape: BlockShape, tp: TensorParallel, name: str):
        super().__init__(shape, tp, name, causal=False)

    def forward(self, state: State) -> State:
        x, positions, mask = opened(EncoderState, state)
        x = self.transform(x, mask=None if mask is None else key_mask(mask))
        return handed_on(EncoderState(x, positions, mask))


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
    """Logits (or losses) of the chosen positions, and the scores of the pair from the first token."""

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
        x, positions, _ = opened(EncoderState, state)
        x = self.tp.gather_sequence(x)  # [s, b, h]; every tensor rank computes the few chosen tokens
        index = positions.transpose(0, 1)[..., None].expand(-1, -1, x.shape[-1])
        chosen = self.norm(self.activation(self.dense(x.gather(0, index))))
        if cross_entropy is None:
            chosen = self.tp.copy_to_ranks(chosen)
        output = self.over(chosen, tied, cross_entropy)
        if self.pooler is None or self.judge is None:
            return output
        return output, self.judge(torch.tanh(self.pooler(x[0])))
