"""The T5 family as one ordered list of layers. Shapes as in pretrain/models/blocks.py.

The state is (x, decoder ids [b, t], mask of the source) in the encoder and (x, the encoder's output, mask of the
source) in the decoder; the mask, int64 [b, s], is there only where a source may be filled up.
"""

from __future__ import annotations

from functools import partial
from math import log

import torch
from torch import Tensor, nn

from parallel.parameter_plan import plan_parameter
from parallel.pipeline_stages import LayerSpec
from parallel.tensor_parallel import TensorParallel
from pretrain.models.blocks import Block, BlockShape, Norm, causal_mask, seen
from pretrain.models.feed_forward import of_block
from pretrain.models.t5.spec import T5Config
from pretrain.models.vocabulary import Embedding, Head, entered, lookup_cost

State = tuple[Tensor, ...]


def layers(config: T5Config, tp: TensorParallel) -> list[LayerSpec]:
    """Input: (source [b, s], decoder ids [b, t]) and maybe the source's mask [b, s]; output: logits [t, b, v/tp]."""
    dense = block_shape(config)
    norm = partial(FinalNorm, "rmsnorm", config.hidden, config.norm_epsilon, tp)
    decoder_cost = config.num_targets / config.sequence_length * 4 / 3
    head_cost = config.num_targets * config.padded_vocab_size / (config.sequence_length * 12 * config.hidden)
    specs = [LayerSpec("embedding", partial(Embedding, config, tp, 1.0), cost=lookup_cost(config.hidden)),
             LayerSpec("encoder.input", partial(Enter, config, tp), cost=0.0)]
    for side, block, count, cost in (("encoder", EncoderBlock, config.layers, 1.0),
                                     ("decoder", DecoderBlock, config.num_decoder_layers, decoder_cost)):
        if side == "decoder":
            specs.append(LayerSpec("decoder.embedding", partial(DecoderEmbedding, config, tp), cost=0.0,
                                   tied_to="embedding"))
        bias = partial(RelativeBias, config, tp, two_sided=side == "encoder")
        specs.append(LayerSpec(f"{side}.bias", bias, cost=0.0, with_next=True))
        for index in range(count):
            name = f"{side}.blocks.{index}"
            shape, extra_cost = of_block(dense, config, index)
            last = {"last": index == count - 1} if side == "decoder" else {}
            specs.append(LayerSpec(name, partial(block, shape, tp, name, **last), cost=cost * (1 + extra_cost),
                                   recompute=True, tied_to=f"{side}.bias"))
        specs.append(LayerSpec(f"{side}.final_norm", norm, cost=0.0))
    small = config.hidden**-0.5  # either way the first logits vary by about 1
    head = partial(Head, config, tp, None, small) if config.tied_head else partial(Head, config, tp, small)
    specs.append(LayerSpec("head", head, cost=head_cost, tied_to="embedding" if config.tied_head else None,
                           vocabulary=True))
    return specs


def block_shape(config: T5Config) -> BlockShape:
    """A T5 config in the words of the shared block; standard deviations as in the published training code."""
    inner = config.heads * config.width
    return BlockShape(
        hidden=config.hidden, heads=config.heads, kv_heads=config.heads, ffn=config.ffn_hidden, norm="rmsnorm",
        norm_position="pre", norm_epsilon=config.norm_epsilon, activation=config.activation, bias=False,
        dropout=config.dropout, attention_dropout=config.attention_dropout, std=config.hidden**-0.5,
        residual_std=inner**-0.5, head_width=config.width, attention_scale=1.0,
        query_std=(config.hidden * config.width) ** -0.5, down_std=config.ffn_hidden**-0.5,
    )


class Enter(nn.Module):
    """[b, s, h] -> [s(/tp), b, h]: there are no absolute positions."""

    def __init__(self, config: T5Config, tp: TensorParallel):
        super().__init__()
        self.tp, self.probability = tp, config.dropout

    def forward(self, state: State) -> State:
        return (entered(state[0], self.tp, self.probability if self.training else 0.0), *state[1:])


class DecoderEmbedding(Enter):
    """From the encoder's state to the decoder's: looks its ids up, and hands the encoder's output on."""

    def forward(self, state: State, embedding: Embedding) -> State:
        memory, ids, *mask = state
        looked_up = embedding(ids).to(memory.dtype)  # a table of another layer is not cast with this one
        x = entered(looked_up, self.tp, self.probability if self.training else 0.0)
        return (x, memory, *mask)


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
        x, ids, *mask = state
        table = bias.table(self.tp.full_length(x)).to(x.dtype)
        if mask:
            table = table.masked_fill(~seen(mask[0]), torch.finfo(x.dtype).min)
        return (super().forward(x, mask=table), ids, *mask)


class DecoderBlock(Block):
    """A causal block with attention to the encoder's output; the last one lets go of it."""

    def __init__(self, shape: BlockShape, tp: TensorParallel, name: str, last: bool):
        super().__init__(shape, tp, name, causal=True, cross=True)
        self.last = last

    def forward(self, state: State, bias: RelativeBias) -> State | Tensor:
        x, memory, *mask = state
        length = self.tp.full_length(x)
        table = bias.table(length).to(x.dtype)
        table = table.masked_fill(~causal_mask(length, x.device), torch.finfo(x.dtype).min)
        x = super().forward(x, mask=table, memory=memory, memory_mask=seen(mask[0]) if mask else None)
        return x if self.last else (x, memory, *mask)


class FinalNorm(Norm):
    """The norm at the end of a side; the rest of the state is handed on."""

    def forward(self, state: State | Tensor) -> State | Tensor:
        if isinstance(state, tuple):
            return (super().forward(state[0]), *state[1:])
        return super().forward(state)
