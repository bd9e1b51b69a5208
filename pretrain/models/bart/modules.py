"""The BART family as one ordered list of layers. Shapes as in blocks.py; t is the length of the target."""

from __future__ import annotations

from functools import partial
from typing import Any

from parallel.pipeline_stages import LayerSpec
from parallel.tensor_parallel import TensorParallel
from pretrain.models.bart.spec import NUM_UNUSED_POSITIONS, SPEC, BARTConfig
from pretrain.models.blocks import Block, key_mask
from pretrain.models.shapes import BlockShape
from pretrain.models.state import DecoderState, EncoderState, State, handed_on, opened
from pretrain.models.vocabulary import Embedding, Head, PositionedInput


def layers(config: BARTConfig, tp: TensorParallel) -> list[LayerSpec]:
    """Input: (source [b, s], decoder ids [b, t]) and maybe the source's mask [b, s]; output: logits [t, b, v/tp]."""
    encoder, decoder = SPEC.stacks(config)
    enter: dict[str, Any] = {"num_positions": config.num_positions, "offset": NUM_UNUSED_POSITIONS,
                             "std": config.init_std, "norm_epsilon": config.norm_epsilon, "dropout": config.dropout}
    specs = [LayerSpec("embedding", partial(Embedding, config, tp, config.init_std)),
             LayerSpec("encoder.input", partial(EncoderInput, tp, config.hidden, **enter))]
    specs += [LayerSpec(name, partial(EncoderBlock, shape, tp, name), recompute=True)
              for name, shape in encoder.named()]
    specs.append(LayerSpec("decoder.input", partial(DecoderInput, tp, config.hidden, **enter), tied_to="embedding"))
    last = f"decoder.blocks.{decoder.num_blocks - 1}"
    specs += [LayerSpec(name, partial(DecoderBlock, shape, tp, name, last=name == last), recompute=True)
              for name, shape in decoder.named()]
    return [*specs, LayerSpec("head", partial(Head, config, tp, None), tied_to="embedding", vocabulary=True)]


class EncoderInput(PositionedInput):
    """Positions and norm of the source."""

    def forward(self, state: State) -> State:
        parts = opened(EncoderState, state)
        return handed_on(parts._replace(x=self.enter(parts.x)))


class DecoderInput(PositionedInput):
    """From the encoder's state to the decoder's: its ids become rows, and the encoder's output becomes the memory."""

    def forward(self, state: State, embedding: Embedding) -> State:
        memory, ids, mask = opened(EncoderState, state)
        return handed_on(DecoderState(self.enter(embedding(ids)), memory, mask))


class EncoderBlock(Block):
    """A block in which every token of the source sees every other."""

    def __init__(self, shape: BlockShape, tp: TensorParallel, name: str):
        super().__init__(shape, tp, name, causal=False)

    def forward(self, state: State) -> State:
        x, ids, mask = opened(EncoderState, state)
        return handed_on(EncoderState(self.transform(x, mask=None if mask is None else key_mask(mask)), ids, mask))


class DecoderBlock(Block):
    """A causal block with attention to the encoder's output; the last one leaves it out of the state."""

    def __init__(self, shape: BlockShape, tp: TensorParallel, name: str, last: bool):
        super().__init__(shape, tp, name, causal=True)
        self.last = last

    def forward(self, state: State) -> State:
        x, memory, mask = opened(DecoderState, state)
        x = self.transform(x, memory=memory, memory_mask=None if mask is None else key_mask(mask))
        return x if self.last else handed_on(DecoderState(x, memory, mask))
