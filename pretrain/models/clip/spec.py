"""CLIP dual encoders: the fields, their limits and the shapes of their layers; no torch."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

from pydantic import Field

from common.errors import Problem
from parallel.layout import divisors
from parallel.rules.model_traits import ModelTraits
from parallel.rules.rule import nearest_multiples
from pretrain.models.family import FamilySpec, TextConfig, heads_divide
from pretrain.models.shapes import BlockShape, BlockStack, EndShape, norm_parameters

NO_PIPELINE = (
    "the two towers of CLIP meet only in a loss over the whole global batch, so no stage could begin its backward "
    "before every micro-batch has passed all stages; ZeRO (parallel.zero_stage) and parallel.tensor "
    "spread the model instead"
)
# Mean and standard deviation of red, green and blue in OpenAI's training images (its released preprocessing).
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
LARGEST_LOGIT_SCALE = 100.0  # Radford et al. 2021, section 2.5: logits are scaled by at most 100


class CLIPConfig(TextConfig):
    """A vision transformer and a causal text transformer with projections to one space. Defaults are OpenAI's."""

    family: Literal["clip"] = Field("clip", description="the architecture")
    image_size: int = Field(224, ge=1, description="height and width in pixels of the image that the model sees")
    patch_size: int = Field(ge=1, description="height and width in pixels of one patch; it divides image_size")
    image_layers: int = Field(ge=1, description="transformer blocks of the image tower")
    image_hidden: int = Field(ge=1, description="width of the image tower")
    image_heads: int = Field(ge=1, description="attention heads of the image tower")
    image_ffn: int | None = Field(
        None, ge=1, description="inner width of its feed-forward part; null: 4 x image_hidden"
    )
    text_layers: int = Field(ge=1, description="transformer blocks of the text tower")
    text_hidden: int = Field(ge=1, description="width of the text tower")
    text_heads: int = Field(ge=1, description="attention heads of the text tower")
    text_ffn: int | None = Field(None, ge=1, description="inner width of its feed-forward part; null: 4 x text_hidden")
    vocab_size: int = Field(49408, ge=2, description="number of token ids")
    sequence_length: int = Field(77, ge=1, description="most tokens of a caption, end-of-text included")
    embedding: int = Field(ge=1, description="width of the space both towers project to")
    activation: Literal["quick_gelu", "gelu"] = Field(
        "quick_gelu", description="non-linearity; `quick_gelu` is x sigmoid(1.702 x), as in OpenAI's models"
    )
    norm_epsilon: float = Field(1e-5, gt=0, description="added to the variance in a norm")
    init_temperature: float = Field(
        0.07, gt=0, description="the learnt scale of the logits starts at 1 / init_temperature; SigLIP starts with 0.1"
    )
    logit_bias: float | None = Field(
        None, description="starting value of a learnt bias of the logits, for the objective `siglip` (-10 in its "
        "paper); null: the model has none"
    )

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def image_tokens(self) -> int:
        """Patches and the class token."""
        return self.num_patches + 1

    @property
    def image_ffn_hidden(self) -> int:
        return 4 * self.image_hidden if self.image_ffn is None else self.image_ffn

    @property
    def text_ffn_hidden(self) -> int:
        return 4 * self.text_hidden if self.text_ffn is None else self.text_ffn


class CLIPSpec(FamilySpec[CLIPConfig]):
    """What is known of a CLIP from its config."""

    config_class = CLIPConfig
    form = "dual_encoder"
    reads = "pairs"
    evaluation = "zero_shot"
    objectives = ("contrastive", "siglip")

    def problems(self, config: CLIPConfig) -> Iterator[Problem]:
        if config.image_size % config.patch_size:
            multiples = " or ".join(map(str, nearest_multiples(config.image_size, config.patch_size)))
            yield Problem("model.patch_size", f"images of {config.image_size} pixels in patches of {config.patch_size}",
                          "patches that divide the image",
                          f"set model.image_size to {multiples}, or model.patch_size to one "
                          f"of {', '.join(map(str, divisors(config.image_size)))}")
        yield from heads_divide(config.image_hidden, config.image_heads, prefix="image_")
        yield from heads_divide(config.text_hidden, config.text_heads, prefix="text_")

    def traits(self, config: CLIPConfig) -> ModelTraits:
        return replace(
            super().traits(config), pads_sequence=True, predicts_tokens=False, pipeline_supported=False,
            why_no_pipeline=NO_PIPELINE,
            why_no_context="each tower speaks for an image or a caption through one token of it, and both are short",
            keys={"model.heads": "model.image_heads, model.text_heads",
                  "model.kv_heads": "model.image_heads, model.text_heads",
                  "model.ffn": "model.image_ffn, model.text_ffn"},
        )

    def stacks(self, config: CLIPConfig) -> tuple[BlockStack, ...]:
        image = self._stack(config, "image", layers=config.image_layers, hidden=config.image_hidden,
                            heads=config.image_heads, ffn=config.image_ffn_hidden, num_tokens=config.image_tokens)
        text = self._stack(config, "text", layers=config.text_layers, hidden=config.text_hidden,
                           heads=config.text_heads, ffn=config.text_ffn_hidden, num_tokens=config.sequence_length)
        return image, text

    def ends(self, config: CLIPConfig, num_predictions: int | None = None) -> dict[str, EndShape]:
        image, text = config.image_hidden, config.text_hidden
        image_norm, text_norm = norm_parameters("layernorm", image), norm_parameters("layernorm", text)
        patch = 3 * config.patch_size**2 * image
        return {
            "image.embedding": EndShape(num_parameters=patch + image * (1 + config.image_tokens) + image_norm,
                                        multiply_adds=config.num_patches * patch),
            "image.head": EndShape(num_parameters=image_norm + image * config.embedding,
                                   multiply_adds=image * config.embedding),
            "text.embedding": EndShape(num_parameters=config.sequence_length * text, per_token_id=text,
                                       num_lookups=config.sequence_length * text),
            "text.head": EndShape(num_parameters=text_norm + text * config.embedding,
                                  multiply_adds=text * config.embedding),
            "scale": EndShape(num_parameters=1 if config.logit_bias is None else 2),
        }

    def _stack(self, config: CLIPConfig, tower: str, *, layers: int, hidden: int, heads: int, ffn: int,
               num_tokens: int) -> BlockStack:
        """One tower; initial weights as in OpenAI's code, which scales them by the width."""
        block = BlockShape(
            hidden=hidden, heads=heads, kv_heads=heads, head_dim=hidden // heads, ffn=ffn, num_tokens=num_tokens,
            norm="layernorm", norm_position="pre", norm_epsilon=config.norm_epsilon, activation=config.activation,
            bias=True, dropout=0.0, attention_dropout=0.0, std=hidden**-0.5,
            residual_std=BlockShape.scaled_residual(hidden**-0.5, layers), up_std=(2 * hidden) ** -0.5,
        )
        return BlockStack(name=f"{tower}.blocks", num_blocks=layers, dense=block)


SPEC = CLIPSpec()
