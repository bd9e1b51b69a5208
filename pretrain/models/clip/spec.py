"""Facts of CLIP dual encoders: the fields, their limits, parameters and FLOPs (no torch)."""

from collections.abc import Iterator
from math import gcd
from typing import Literal

from pydantic import Field

from parallel.layout import divisors
from parallel.rules.model_traits import ModelTraits
from parallel.rules.rule import Found, nearest_multiples
from pretrain.models.family import FamilySpec, TextConfig

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


def problems(config: CLIPConfig) -> Iterator[Found]:
    """What does not fit together inside one model, as (where, asked, possible, change)."""
    if config.image_size % config.patch_size:
        multiples = " or ".join(map(str, nearest_multiples(config.image_size, config.patch_size)))
        yield ("model.patch_size", f"images of {config.image_size} pixels in patches of {config.patch_size}",
               "patches that divide the image", f"set model.image_size to {multiples}, or model.patch_size to one of "
               f"{', '.join(map(str, divisors(config.image_size)))}")
    for tower in ("image", "text"):
        hidden, heads = getattr(config, f"{tower}_hidden"), getattr(config, f"{tower}_heads")
        if hidden % heads:
            near = sorted(divisors(hidden), key=lambda number: abs(number - heads))[:3]
            yield (f"model.{tower}_heads", f"{tower}_hidden={hidden} in {heads} heads", "heads that divide the width",
                   f"set model.{tower}_heads to one of {', '.join(map(str, sorted(near)))}")


def facts(config: CLIPConfig) -> ModelTraits:
    """What the rules need to know; where both towers must be shared out evenly, what divides both."""
    heads = gcd(config.image_heads, config.text_heads)
    return ModelTraits(
        layers=config.image_layers + config.text_layers, heads=heads, kv_heads=heads,
        hidden=gcd(config.image_hidden, config.text_hidden), ffn=gcd(config.image_ffn_hidden, config.text_ffn_hidden),
        vocab_size=config.padded_vocab_size, sequence_length=config.sequence_length, pads_sequence=True,
        predicts_tokens=False, pipeline_supported=False, why_no_pipeline=NO_PIPELINE,
        why_no_context="each tower speaks for an image or a caption through one token of it, and both are short",
        keys={"model.heads": "model.image_heads, model.text_heads",
              "model.kv_heads": "model.image_heads, model.text_heads",
              "model.ffn": "model.image_ffn, model.text_ffn"},
    )


def parameter_count(config: CLIPConfig) -> int:
    """Parameters with the vocabulary as it is, which is what is published."""
    return _parameters(config, config.vocab_size)


def built_parameter_count(config: CLIPConfig) -> int:
    """Parameters with the vocabulary padded, which is what memory holds."""
    return _parameters(config, config.padded_vocab_size)


def flops_per_sample(config: CLIPConfig, sequence_length: int) -> int:
    """Model FLOPs of forward and backward for one image and its caption of `sequence_length` tokens.

    Matrix products only, two FLOPs for each multiply-add, three passes, whole attention squares.
    """
    image = _tower_flops(config.image_layers, config.image_hidden, config.image_ffn_hidden, config.image_tokens)
    image += 2 * config.num_patches * 3 * config.patch_size**2 * config.image_hidden
    text = _tower_flops(config.text_layers, config.text_hidden, config.text_ffn_hidden, sequence_length)
    projections = 2 * config.embedding * (config.image_hidden + config.text_hidden)
    return 3 * (image + text + projections)


def _tower_flops(layers: int, hidden: int, ffn: int, num_tokens: int) -> int:
    weights = 4 * hidden**2 + 2 * hidden * ffn
    return layers * num_tokens * (2 * weights + 4 * hidden * num_tokens)


def _parameters(config: CLIPConfig, vocab_size: int) -> int:
    image = 3 * config.patch_size**2 * config.image_hidden + config.image_hidden * (1 + config.image_tokens)
    image += _blocks(config.image_layers, config.image_hidden, config.image_ffn_hidden)
    image += 4 * config.image_hidden + config.image_hidden * config.embedding  # two norms and the projection
    text = config.text_hidden * (vocab_size + config.sequence_length)
    text += _blocks(config.text_layers, config.text_hidden, config.text_ffn_hidden)
    text += 2 * config.text_hidden + config.text_hidden * config.embedding
    return image + text + 1 + (config.logit_bias is not None)


def _blocks(layers: int, hidden: int, ffn: int) -> int:
    attention = 4 * hidden**2 + 4 * hidden
    feed_forward = 2 * hidden * ffn + ffn + hidden
    return layers * (attention + feed_forward + 4 * hidden)


SPEC = FamilySpec(
    config_class=CLIPConfig,
    form="dual_encoder",
    reads="pairs",
    evaluation="zero_shot",
    objectives=("contrastive", "siglip"),
    problems=problems,
    facts=facts,
    parameter_count=parameter_count,
    built_parameter_count=built_parameter_count,
    flops_per_token=flops_per_sample,
)
