"""The T5 family as one ordered list of layers. Shapes as in blocks.py; t is the length of the target."""

from __future__ import annotations

from functools import partial
from math import log
from typing import overload

import torch
from torch import Tensor, nn

from parallel.parameter_plan import plan_parameter
from parallel.pipeline_stages import LayerSpec
from parallel.tensor_parallel import TensorParallel
from pretrain.models.blocks import Block, Norm, causal_mask, key_mask
from pretrain.models.shapes import BlockShape
from pretrain.models.state import DecoderState, EncoderState, State, handed_on, opened
from pretrain.models.t5.spec import SPEC, T5Config
from pretrain.models.vocabulary import Embedding, Head, entered


def layers(config: T5Config, tp: TensorParallel) -> list[LayerSpec]:
    """Input: (source [b, s], decoder ids [b, t]) and maybe the source's mask [b, s]; output: logits [t, b, v/tp]."""
    norm = partial(FinalNorm, "rmsnorm", config.hidden, config.norm_epsilon, tp)
    encoder, decoder = SPEC.stacks(config)
    specs = [LayerSpec("embedding", partial(Embedding, config, tp, 1.0)),
             LayerSpec("encoder.input", partial(Enter, config, tp)),
             LayerSpec("encoder.bias", partial(RelativeBias, config, tp, two_sided=True), with_next=True)]
    specs += [LayerSpec(name, partial(EncoderBlock, shape, tp, name), tied_to="encoder.bias", recompute=True)
              for name, shape in encoder.named()]
    specs += [LayerSpec("encoder.final_norm", norm),
              LayerSpec("decoder.embedding", partial(DecoderEmbedding, config, tp), tied_to="embedding"),
              LayerSpec("decoder.bias", partial(RelativeBias, config, tp, two_sided=False), with_next=True)]
    last = f"decoder.blocks.{decoder.num_blocks - 1}"
    specs += [LayerSpec(name, partial(DecoderBlock, shape, tp, name, last=name == last), tied_to="decoder.bias",
                        recompute=True) for name, shape in decoder.named()]
    small = config.hidden**-0.5  # either way the first logits vary by about 1
    head = partial(Head, config, tp, None, small) if config.tied_head else partial(Head, config, tp, small)
    return [*specs, LayerSpec("decoder.final_norm", norm),
            LayerSpec("head", head, tied_to="embedding" if config.tied_head else None, vocabulary=True)]


class Entrance(nn.Module):
    """[b, s, h] -> [s(/tp), b, h]: there are no absolute positions."""

    def __init__(self, config: T5Config, tp: TensorParallel):
        super().__init__()
        self.tp, self.probability = tp, config.dropout

    def enter(self, x: Tensor) -> Tensor:
        """Rows of the token table [b, s, h] -> [s(/tp), b, h], with dropout in training."""
        return entered(x, self.tp, self.probability if self.training else 0.0)


class Enter(Entrance):
    """From rows of the token table to the encoder's state."""

    def forward(self, state: State) -> State:
        parts = opened(EncoderState, state)
        return handed_on(parts._replace(x=self.enter(parts.x)))


class DecoderEmbedding(Entrance):
    """From the encoder's state to the decoder's: its ids become rows, and the encoder's output becomes the memory."""

    def forward(self, state: State, embedding: Embedding) -> State:
        memory, ids, mask = opened(EncoderState, state)
        looked_up = embedding(ids).to(memory.dtype)  # a table of another layer is not cast with this one
        return handed_on(DecoderState(self.enter(looked_up), memory, mask))


class RelativeBias(nn.Module):
    """One number for each head and bucket of distances, shared by the blocks of a side (Raffel et al. 2020, 2.1).

    In the list it stands before the blocks that use it and leaves the state as it is.
    """

    def __init__(self, config: T5Config, tp: TensorParallel, two_sided: bool):
        super().__init__()
        self.num_buckets, self.max_distance = config.relative_buckets, config.relative_max_distance
        self.two_sided = two_sided
        self.weight = nn.Parameter(torch.empty(self.num_buckets, config.heads // tp.size, device=tp.device))
        plan_parameter(self.weight, std=config.hidden**-0.5, slice_dim=1)

    def forward(self, state: State) -> State:
        return state

    def table(self, length: int) -> Tensor:
        """The bias of every pair of positions, [1, heads/tp, length, length]: queries, then keys."""
        # A row of all distances 1 - length .. length - 1 (and one that no pair has), shifted by one for each query:
        # rows of 2 length read as rows of 2 length - 1 do that, and the backward is a sum instead of a scatter.
        distance = torch.arange(1 - length, length + 1, device=self.weight.device)
        values = self.weight[self.buckets(distance)].transpose(0, 1)  # [heads/tp, 2 length]
        rows = values[:, None, :].expand(-1, length, -1).reshape(values.shape[0], -1)
        rows = rows[:, : length * (2 * length - 1)].view(values.shape[0], length, 2 * length - 1)
        return rows[None, :, :, length - 1 :]

    def buckets(self, distance: Tensor) -> Tensor:
        """Key position minus query position -> bucket: near distances one each, far ones by their logarithm."""
        count = self.num_buckets // 2 if self.two_sided else self.num_buckets
        offset = (distance > 0) * count if self.two_sided else 0
        distance = distance.abs() if self.two_sided else (-distance).clamp(min=0)
        exact = count // 2
        scale = (count - exact) / log(self.max_distance / exact)
        far = exact + (torch.log(distance.clamp(min=1).float() / exact) * scale).long()
        return offset + torch.where(distance < exact, distance, far.clamp(max=count - 1))


class EncoderBlock(Block):
    """A block in which every token of the source sees every other."""

    def __init__(self, shape: BlockShape, tp: TensorParallel, name: str):
        super().__init__(shape, tp, name, causal=False)

    def forward(self, state: State, bias: RelativeBias) -> State:
        x, ids, mask = opened(EncoderState, state)
        table = bias.table(self.tp.full_length(x)).to(x.dtype)
        if mask is not None:
            table = table.masked_fill(~key_mask(mask), torch.finfo(x.dtype).min)
        return handed_on(EncoderState(self.transform(x, mask=table), ids, mask))


class DecoderBlock(Block):
    """A causal block with attention to the encoder's output; the last one leaves it out of the state."""

    def __init__(self, shape: BlockShape, tp: TensorParallel, name: str, last: bool):
        super().__init__(shape, tp, name, causal=True)
        self.last = last

    def forward(self, state: State, bias: RelativeBias) -> State:
        x, memory, mask = opened(DecoderState, state)
        length = self.tp.full_length(x)
        table = bias.table(length).to(x.dtype)
        table = table.masked_fill(~causal_mask(length, x.device), torch.finfo(x.dtype).min)
        x = self.transform(x, mask=table, memory=memory, memory_mask=None if mask is None else key_mask(mask))
        return x if self.last else handed_on(DecoderState(x, memory, mask))


class FinalNorm(Norm):
    """The norm at the end of the encoder or the decoder, on the first part of the state, whichever side's it is."""

    @overload
    def forward(self, state: Tensor) -> Tensor: ...

    @overload
    def forward(self, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]: ...

    def forward(self, state: State) -> State:
        if isinstance(state, tuple):
            return (super().forward(state[0]), *state[1:])
        return super().forward(state)
