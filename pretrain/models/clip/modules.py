"""The CLIP family as one ordered list of layers: image tower, text tower, scale (Radford et al. 2021, section 2.4).

Shapes as in pretrain/models/blocks.py; p is the number of image tokens, e the width of the shared space. Under sequence
parallelism a tower's sequence is padded to a multiple of the tensor degree; the padding is never a key nor pooled.
"""

from __future__ import annotations

from functools import partial
from math import log, sqrt
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.parameter_plan import plan_parameter
from parallel.pipeline_stages import LayerSpec
from parallel.tensor_parallel import TensorParallel
from pretrain.models.blocks import Block, Norm
from pretrain.models.clip.spec import LARGEST_LOGIT_SCALE, PIXEL_MEAN, PIXEL_STD, SPEC, CLIPConfig


class Towers(NamedTuple):
    """Between the layers; each tower's layers replace their own part, and leave the other alone (which may be None)."""

    image: Tensor  # pixels [b, 3, S, S], then [p(/t), b, h], then unit vectors [b, e]
    text: Tensor  # ids int64 [b, s], then [s(/t), b, h], then unit vectors [b, e]
    ends: Tensor  # where each caption ends, int64 [b]


def layers(config: CLIPConfig, tp: TensorParallel) -> list[LayerSpec]:
    """Input: (pixels [b, 3, S, S], ids [b, s], ends [b]); output as `Scale` says."""
    image, text = SPEC.stacks(config)
    image_block = partial(ImageBlock, num_keys=config.image_tokens)
    return [
        LayerSpec("image.embedding", partial(ImageEmbedding, config, tp)),
        *(LayerSpec(name, partial(image_block, shape, tp, name, causal=False), recompute=True)
          for name, shape in image.named()),
        LayerSpec("image.head", partial(ImageHead, config, tp)),
        LayerSpec("text.embedding", partial(TextEmbedding, config, tp)),
        *(LayerSpec(name, partial(TextBlock, shape, tp, name, causal=True), recompute=True)
          for name, shape in text.named()),
        LayerSpec("text.head", partial(TextHead, config, tp)),
        LayerSpec("scale", partial(Scale, config, tp)),
    ]


def _parameter(tp: TensorParallel, *shape: int, mean: float = 0.0, std: float = 0.0, max_value: float | None = None
               ) -> nn.Parameter:
    parameter = nn.Parameter(torch.empty(*shape, device=tp.device))
    plan_parameter(parameter, mean=mean, std=std, max_value=max_value)
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

    def forward(self, state: tuple) -> Towers:  # pixels uint8, or real and normalised: [b, 3, S, S] -> [p(/t), b, h]
        parts = Towers(*state)
        pixels = parts.image
        if pixels.dtype == torch.uint8:
            mean, std = (torch.tensor(values, device=pixels.device)[:, None, None]
                         for values in (PIXEL_MEAN, PIXEL_STD))
            pixels = (pixels.float() / 255 - mean) / std
        x = F.conv2d(pixels.to(self.patches.dtype), self.patches, stride=self.patches.shape[-1])
        x = x.flatten(2).transpose(1, 2)  # [b, h, rows, columns] -> [b, patches, h]
        x = torch.cat((self.class_token.expand(x.shape[0], 1, -1), x), dim=1) + self.positions
        return parts._replace(image=self.norm(_enter(x, self.tp)))


class ImageBlock(Block):
    """A block of the image tower: every token sees every other, and none the padding."""

    def forward(self, state: tuple) -> Towers:
        parts = Towers(*state)
        return parts._replace(image=self.transform(parts.image))


class ImageHead(nn.Module):
    """The class token, normed and projected: [p(/t), b, h] -> unit vectors [b, e] in fp32."""

    def __init__(self, config: CLIPConfig, tp: TensorParallel):
        super().__init__()
        self.tp = tp
        self.norm = Norm("layernorm", config.image_hidden, config.norm_epsilon, tp)
        self.projection = _parameter(tp, config.embedding, config.image_hidden, std=config.image_hidden**-0.5)

    def forward(self, state: tuple) -> Towers:
        parts = Towers(*state)
        pooled = self.tp.gather_sequence(self.norm(parts.image))[0]
        return parts._replace(image=_unit(F.linear(pooled, self.projection)))


class TextEmbedding(nn.Module):
    """Token table, sliced over the vocabulary, and learned positions: ids [b, s] -> [s(/t), b, h]."""

    def __init__(self, config: CLIPConfig, tp: TensorParallel):
        super().__init__()
        self.tp = tp
        self.table = tp.vocabulary(config.padded_vocab_size, config.text_hidden, std=0.02)
        self.positions = _parameter(tp, config.sequence_length, config.text_hidden, std=0.01)

    def forward(self, state: tuple) -> Towers:
        parts = Towers(*state)
        x = self.table(parts.text) + self.positions[: parts.text.shape[1]]
        return parts._replace(text=_enter(x, self.tp))


class TextBlock(Block):
    """A block of the text tower: a token sees itself and the tokens before it."""

    def forward(self, state: tuple) -> Towers:
        parts = Towers(*state)
        return parts._replace(text=self.transform(parts.text))


class TextHead(nn.Module):
    """The token at the end of the text, normed and projected: [s(/t), b, h] -> unit vectors [b, e] in fp32."""

    def __init__(self, config: CLIPConfig, tp: TensorParallel):
        super().__init__()
        self.tp = tp
        self.norm = Norm("layernorm", config.text_hidden, config.norm_epsilon, tp)
        self.projection = _parameter(tp, config.embedding, config.text_hidden, std=config.text_hidden**-0.5)

    def forward(self, state: tuple) -> Towers:
        parts = Towers(*state)
        text = self.tp.gather_sequence(self.norm(parts.text))
        pooled = text[parts.ends, torch.arange(text.shape[1], device=text.device)]
        return parts._replace(text=_unit(F.linear(pooled, self.projection)))


class Scale(nn.Module):
    """The learnt scale of the logits, at most 100, multiplied into the image vectors; and the bias where there is one.

    Output: (image [b, e] times the scale, text [b, e] of length 1[, bias [b], the same for all]), fp32. Everything has
    the samples as first dim, so that a loss over the global batch can be computed from collected outputs.
    """

    def __init__(self, config: CLIPConfig, tp: TensorParallel):
        super().__init__()
        self.logit_scale = _parameter(tp, 1, mean=log(1 / config.init_temperature), max_value=log(LARGEST_LOGIT_SCALE))
        self.logit_bias = None
        if config.logit_bias is not None:
            self.logit_bias = _parameter(tp, 1, mean=config.logit_bias)

    def forward(self, state: tuple) -> tuple[Tensor, ...]:
        image, text, _ = Towers(*state)
        image = image * self.logit_scale.float().exp()
        return (image, text) if self.logit_bias is None else (image, text, self.logit_bias.float().expand(len(text)))


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x.float(), dim=-1)
