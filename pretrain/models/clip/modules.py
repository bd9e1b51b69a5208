"""The CLIP family as one ordered list of layers: image tower, text tower, scale (Radford et al. 2021, section 2.4).

The state is a tuple (image, text, ends) that each layer takes and returns; a tower's layers replace their own part of
it. Shapes as in pretrain/models/blocks.py; p is the number of image tokens, e the width of the shared space. Under
sequence parallelism a tower's sequence is padded to a multiple of the tensor degree; what is padded is never a key nor
pooled.
"""

from __future__ import annotations

from functools import partial
from math import log, sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.parameter_plan import plan_parameter
from parallel.pipeline_stages import LayerSpec
from parallel.tensor_parallel import TensorParallel
from pretrain.models.blocks import Block, BlockShape, Norm
from pretrain.models.clip.spec import LARGEST_LOGIT_SCALE, PIXEL_MEAN, PIXEL_STD, CLIPConfig

State = tuple[Tensor, Tensor, Tensor]


def layers(config: CLIPConfig, tp: TensorParallel) -> list[LayerSpec]:
    """Input: (pixels [b, 3, S, S], ids [b, s], ends [b]); output as `Scale` says."""
    image_cost = config.image_hidden**2 * config.image_tokens
    text_cost = config.text_hidden**2 * config.sequence_length
    specs = [LayerSpec("image.embedding", partial(ImageEmbedding, config, tp), cost=0.0)]
    for index in range(config.image_layers):
        name = f"image.blocks.{index}"
        specs.append(LayerSpec(name, partial(ImageBlock, config, tp, name), cost=image_cost, recompute=True))
    specs += [LayerSpec("image.head", partial(ImageHead, config, tp), cost=0.0),
              LayerSpec("text.embedding", partial(TextEmbedding, config, tp), cost=0.0)]
    for index in range(config.text_layers):
        name = f"text.blocks.{index}"
        specs.append(LayerSpec(name, partial(TextBlock, config, tp, name), cost=text_cost, recompute=True))
    specs += [LayerSpec("text.head", partial(TextHead, config, tp), cost=0.0),
              LayerSpec("scale", partial(Scale, config, tp), cost=0.0)]
    return specs


def tower_shape(config: CLIPConfig, tower: str) -> BlockShape:
    """One tower in the words of the shared block; initial weights as in OpenAI's code, which scales them by width."""
    hidden, num_layers = getattr(config, f"{tower}_hidden"), getattr(config, f"{tower}_layers")
    heads = getattr(config, f"{tower}_heads")
    return BlockShape(
        hidden=hidden, heads=heads, kv_heads=heads, ffn=getattr(config, f"{tower}_ffn_hidden"), norm="layernorm",
        norm_position="pre", norm_epsilon=config.norm_epsilon, activation=config.activation, bias=True, dropout=0.0,
        attention_dropout=0.0, std=hidden**-0.5, residual_std=BlockShape.scaled_residual(hidden**-0.5, num_layers),
        rotary_base=None, up_std=(2 * hidden) ** -0.5,
    )


def _parameter(tp: TensorParallel, *shape: int, **plan: float) -> nn.Parameter:
    parameter = nn.Parameter(torch.empty(*shape, device=tp.device))
    plan_parameter(parameter, **plan)
    return parameter


def _enter(x: Tensor, tp: TensorParallel) -> Tensor:
    """[b, s, h] -> [s(/t), b, h], padded with zeros where the tensor degree does not divide s."""
    x = x.transpose(0, 1).contiguous()
    if tp.sequence:
        x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[0] % tp.size))
    return tp.scatter_sequence(x)


class ImageEmbedding(nn.Module):
    """Patches by one linear map, a class token before them, learned positions, and a norm (`ln_pre`)."""

    def __init__(self, config: CLIPConfig, tp: TensorParallel):
        super().__init__()
        self.tp, std = tp, config.image_hidden**-0.5
        size = config.patch_size
        self.patches = _parameter(tp, config.image_hidden, 3, size, size, std=1 / sqrt(3 * size * size))
        self.class_token = _parameter(tp, config.image_hidden, std=std)
        self.positions = _parameter(tp, config.image_tokens, config.image_hidden, std=std)
        self.norm = Norm("layernorm", config.image_hidden, config.norm_epsilon, tp)

    def forward(self, state: State) -> State:  # pixels uint8, or real and normalised: [b, 3, S, S] -> [p(/t), b, h]
        pixels, *others = state
        if pixels.dtype == torch.uint8:
            mean, std = (torch.tensor(values, device=pixels.device)[:, None, None]
                         for values in (PIXEL_MEAN, PIXEL_STD))
            pixels = (pixels.float() / 255 - mean) / std
        x = F.conv2d(pixels.to(self.patches.dtype), self.patches, stride=self.patches.shape[-1])
        x = x.flatten(2).transpose(1, 2)  # [b, h, rows, columns] -> [b, patches, h]
        x = torch.cat((self.class_token.expand(x.shape[0], 1, -1), x), dim=1) + self.positions
        return self.norm(_enter(x, self.tp)), *others


class ImageBlock(Block):
    """A block of the image tower: every token sees every other, and none the padding."""

    def __init__(self, config: CLIPConfig, tp: TensorParallel, name: str):
        super().__init__(tower_shape(config, "image"), tp, name, causal=False, num_keys=config.image_tokens)

    def forward(self, state: State) -> State:
        image, *others = state
        return super().forward(image), *others


class ImageHead(nn.Module):
    """The class token, normed and projected: [p(/t), b, h] -> unit vectors [b, e] in fp32."""

    def __init__(self, config: CLIPConfig, tp: TensorParallel):
        super().__init__()
        self.tp = tp
        self.norm = Norm("layernorm", config.image_hidden, config.norm_epsilon, tp)
        self.projection = _parameter(tp, config.embedding, config.image_hidden, std=config.image_hidden**-0.5)

    def forward(self, state: State) -> State:
        image, *others = state
        pooled = self.tp.gather_sequence(self.norm(image))[0]
        return _unit(F.linear(pooled, self.projection)), *others


class TextEmbedding(nn.Module):
    """Token table, sliced over the vocabulary, and learned positions: ids [b, s] -> [s(/t), b, h]."""

    def __init__(self, config: CLIPConfig, tp: TensorParallel):
        super().__init__()
        self.tp = tp
        self.table = tp.vocabulary(config.padded_vocab_size, config.text_hidden, std=0.02)
        self.positions = _parameter(tp, config.sequence_length, config.text_hidden, std=0.01)

    def forward(self, state: State) -> State:
        image, ids, ends = state
        return image, _enter(self.table(ids) + self.positions[: ids.shape[1]], self.tp), ends


class TextBlock(Block):
    """A block of the text tower: a token sees itself and what stands before it."""

    def __init__(self, config: CLIPConfig, tp: TensorParallel, name: str):
        super().__init__(tower_shape(config, "text"), tp, name, causal=True)

    def forward(self, state: State) -> State:
        image, text, ends = state
        return image, super().forward(text), ends


class TextHead(nn.Module):
    """The token at the end of the text, normed and projected: [s(/t), b, h] -> unit vectors [b, e] in fp32."""

    def __init__(self, config: CLIPConfig, tp: TensorParallel):
        super().__init__()
        self.tp = tp
        self.norm = Norm("layernorm", config.text_hidden, config.norm_epsilon, tp)
        self.projection = _parameter(tp, config.embedding, config.text_hidden, std=config.text_hidden**-0.5)

    def forward(self, state: State) -> State:
        image, text, ends = state
        text = self.tp.gather_sequence(self.norm(text))
        pooled = text[ends, torch.arange(text.shape[1], device=text.device)]
        return image, _unit(F.linear(pooled, self.projection)), ends


class Scale(nn.Module):
    """The learnt scale of the logits, at most 100, folded into the image vectors; and the bias where there is one.

    Output: (image [b, e] times the scale, text [b, e] of length 1[, bias [b], the same for all]), fp32. Everything has
    the samples as first dim, so that a loss over the global batch can be computed from collected outputs.
    """

    def __init__(self, config: CLIPConfig, tp: TensorParallel):
        super().__init__()
        self.logit_scale = _parameter(tp, 1, mean=log(1 / config.init_temperature), max_value=log(LARGEST_LOGIT_SCALE))
        self.logit_bias = None
        if config.logit_bias is not None:
            self.logit_bias = _parameter(tp, 1, mean=config.logit_bias)

    def forward(self, state: State) -> tuple[Tensor, ...]:
        image, text, _ = state
        image = image * self.logit_scale.float().exp()
        return (image, text) if self.logit_bias is None else (image, text, self.logit_bias.float().expand(len(text)))


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x.float(), dim=-1)
