"""The BART family as one ordered list of layers. Shapes as in pretrain/models/blocks.py.

The state is (x, decoder ids [b, t], mask of the source) in the encoder and (x, the encoder's output, mask of the
source) in the decoder; the mask, int64 [b, s], is there only where a source may be filled up.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from parallel.pipeline_stages import LayerSpec
from parallel.tensor_parallel import TensorParallel
from pretrain.models.bart.spec import NUM_UNUSED_POSITIONS, BARTConfig
from pretrain.models.blocks import Block, BlockShape, seen
from pretrain.models.feed_forward import of_block
from pretrain.models.vocabulary import Embedding, Head, PositionedInput, lookup_cost

State = tuple[Tensor, ...]


def layers(config: BARTConfig, tp: TensorParallel) -> list[LayerSpec]:
    """Input: (source [b, s], decoder ids [b, t]) and maybe the source's mask [b, s]; output: logits [t, b, v/tp]."""
    dense = block_shape(config)
    decoder_cost = config.num_targets / config.sequence_length * 4 / 3
    head_cost = config.num_targets * config.padded_vocab_size / (config.sequence_length * 12 * config.hidden)
    enter = {"num_positions": config.num_positions, "offset": NUM_UNUSED_POSITIONS, "hidden": config.hidden,
             "std": config.init_std, "norm_epsilon": config.norm_epsilon, "dropout": config.dropout, "tp": tp}
    table = partial(Embedding, config, tp, config.init_std)
    specs = [LayerSpec("embedding", table, cost=lookup_cost(config.hidden)),
             LayerSpec("encoder.input", partial(EncoderInput, **enter), cost=0.0)]
    for index in range(config.layers):
        name = f"encoder.blocks.{index}"
        shape, extra_cost = of_block(dense, config, index)
        specs.append(LayerSpec(name, partial(EncoderBlock, shape, tp, name), cost=1 + extra_cost, recompute=True))
    specs.append(LayerSpec("decoder.input", partial(DecoderInput, **enter), cost=0.0, tied_to="embedding"))
    for index in range(config.num_decoder_layers):
        name = f"decoder.blocks.{index}"
        shape, extra_cost = of_block(dense, config, index)
        block = partial(DecoderBlock, shape, tp, name, last=index == config.num_decoder_layers - 1)
        specs.append(LayerSpec(name, block, cost=decoder_cost * (1 + extra_cost), recompute=True))
    specs.append(LayerSpec("head", partial(Head, config, tp, None), cost=head_cost, tied_to="embedding",
                           vocabulary=True))
    return specs


def block_shape(config: BARTConfig) -> BlockShape:
    """A BART config in the words of the shared block."""
    return BlockShape(
        hidden=config.hidden, heads=config.heads, kv_heads=config.heads, ffn=config.ffn_hidden, norm="layernorm",
        norm_position="post", norm_epsilon=config.norm_epsilon, activation=config.activation, bias=True,
        dropout=config.dropout, attention_dropout=config.attention_dropout, std=config.init_std,
        residual_std=config.init_std,
    )


class EncoderInput(PositionedInput):
    """Positions and norm of the source."""

    def forward(self, state: State) -> State:
        return (self.enter(state[0]), *state[1:])


class DecoderInput(PositionedInput):
    """From the encoder's state to the decoder's: looks its ids up, and hands the encoder's output on."""

    def forward(self, state: State, embedding: Embedding) -> State:
        memory, ids, *mask = state
        return (self.enter(embedding(ids)), memory, *mask)


class EncoderBlock(Block):
    """A block in which every token of the source sees every other."""

    def __init__(self, shape: BlockShape, tp: TensorParallel, name: str):
        super().__init__(shape, tp, name, causal=False)

    def forward(self, state: State) -> State:
        x, ids, *mask = state
        return (super().forward(x, mask=seen(mask[0]) if mask else None), ids, *mask)


class DecoderBlock(Block):
    """A causal block with attention to the encoder's output; the last one lets go of it."""

    def __init__(self, shape: BlockShape, tp: TensorParallel, name: str, last: bool):
        super().__init__(shape, tp, name, causal=True, cross=True)
        self.last = last

    def forward(self, state: State) -> State | Tensor:
        x, memory, *mask = state
        x = super().forward(x, memory=memory, memory_mask=seen(mask[0]) if mask else None)
        return x if self.last else (x, memory, *mask)
