"""CLIP in transformers (no torch)."""

from __future__ import annotations

from typing import Any

from data_pipeline.corruption.special_ids import SpecialIds
from pretrain.models.clip.spec import PIXEL_MEAN, PIXEL_STD, CLIPConfig
from pretrain.models.hf_adapter import HFAdapter, RandomInputs, Tensors, TrainingModel
from pretrain.models.hf_map import (
    Architecture,
    Entry,
    FieldRule,
    Ignored,
    Mapped,
    RequiredValue,
    Shaped,
    SupportedValues,
    attention_parts,
    vocabulary,
)

BICUBIC = 3  # Pillow's number


def _tower_names(config: CLIPConfig, tower: str, theirs: str) -> tuple[Entry, ...]:
    block, layer = f"{tower}.blocks.{{n}}", f"{theirs}.encoder.layers.{{n}}"
    hidden, heads = getattr(config, f"{tower}_hidden"), getattr(config, f"{tower}_heads")
    return (
        Entry(f"{block}.attention_norm.{{p}}", f"{layer}.layer_norm1.{{p}}"),
        Entry(f"{block}.attention.qkv.{{p}}", tuple(f"{layer}.self_attn.{part}_proj.{{p}}" for part in "qkv"),
              (attention_parts(heads, heads, hidden // heads),)),
        Entry(f"{block}.attention.out.{{p}}", f"{layer}.self_attn.out_proj.{{p}}"),
        Entry(f"{block}.feed_forward_norm.{{p}}", f"{layer}.layer_norm2.{{p}}"),
        Entry(f"{block}.feed_forward.up.{{p}}", f"{layer}.mlp.fc1.{{p}}"),
        Entry(f"{block}.feed_forward.down.{{p}}", f"{layer}.mlp.fc2.{{p}}"),
    )


def _names(config: CLIPConfig) -> tuple[Entry, ...]:
    return (
        Entry("image.embedding.patches", "vision_model.embeddings.patch_embedding.weight"),
        Entry("image.embedding.class_token", "vision_model.embeddings.class_embedding"),
        Entry("image.embedding.positions", "vision_model.embeddings.position_embedding.weight"),
        Entry("image.embedding.norm.{p}", "vision_model.pre_layrnorm.{p}"),
        *_tower_names(config, "image", "vision_model"),
        Entry("image.head.norm.{p}", "vision_model.post_layernorm.{p}"),
        Entry("image.head.projection", "visual_projection.weight"),
        Entry("text.embedding.table.weight", "text_model.embeddings.token_embedding.weight", (vocabulary(config),)),
        Entry("text.embedding.positions", "text_model.embeddings.position_embedding.weight"),
        *_tower_names(config, "text", "text_model"),
        Entry("text.head.norm.{p}", "text_model.final_layer_norm.{p}"),
        Entry("text.head.projection", "text_projection.weight"),
        Entry("scale.logit_scale", "logit_scale", (Shaped((1,), ()),)),
    )


def _read(values: dict[str, Any]) -> dict[str, Any]:
    """Where a text ends: older files say 2 and mean the largest id of the vocabulary; the rule is in CLIPTextModel."""
    text = dict(values.get("text_config") or {})
    vocabulary_size = text.get("vocab_size", 49408)
    if text.get("eos_token_id", 49407) == 2 and isinstance(vocabulary_size, int):
        text["eos_token_id"] = vocabulary_size - 1
    return {**values, "text_config": {"eos_token_id": 49407, **text}}


def _tower_fields(tower: str, theirs: str, *, hidden: int, ffn: int, heads: int) -> tuple[FieldRule[CLIPConfig], ...]:
    return (
        Mapped(f"{tower}_layers", f"{theirs}.num_hidden_layers", 12),
        Mapped(f"{tower}_hidden", f"{theirs}.hidden_size", hidden),
        Mapped(f"{tower}_heads", f"{theirs}.num_attention_heads", heads),
        Mapped(f"{tower}_ffn", f"{theirs}.intermediate_size", ffn,
               value=lambda config: getattr(config, f"{tower}_ffn_hidden")),
        Mapped("activation", f"{theirs}.hidden_act", "quick_gelu"),
        Mapped("norm_epsilon", f"{theirs}.layer_norm_eps", 1e-5),
        # Each tower alone would be given this width; both together take the one above them.
        Ignored((f"{theirs}.projection_dim", f"{theirs}.initializer_range", f"{theirs}.initializer_factor",
                 f"{theirs}.dropout")),
        RequiredValue(f"{theirs}.attention_dropout", 0.0, 0.0),
    )


def _image_processor(config: CLIPConfig) -> dict[str, Any]:
    """What becomes of an image: the shorter side to the model's size, the square in the middle, normalised."""
    size = config.image_size
    return {
        "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True, "do_resize": True, "resample": BICUBIC,
        "size": {"shortest_edge": size}, "do_center_crop": True, "crop_size": {"height": size, "width": size},
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": list(PIXEL_MEAN),
        "image_std": list(PIXEL_STD),
    }


CLIP: Architecture[CLIPConfig] = Architecture(
    model_type="clip",
    class_name=lambda config: "CLIPModel",
    fields=(
        *_tower_fields("image", "vision_config", hidden=768, ffn=3072, heads=12),
        *_tower_fields("text", "text_config", hidden=512, ffn=2048, heads=8),
        Mapped("image_size", "vision_config.image_size", 224),
        Mapped("patch_size", "vision_config.patch_size", 32),
        Mapped("vocab_size", "text_config.vocab_size", 49408),
        Mapped("sequence_length", "text_config.max_position_embeddings", 77),
        Mapped("embedding", "projection_dim", 512),
        SupportedValues("logit_bias", (None,)),
        RequiredValue("vision_config.num_channels", 3, 3),
        RequiredValue("text_config_dict", None, None, "put its values into text_config"),
        RequiredValue("vision_config_dict", None, None, "put its values into vision_config"),
        Ignored(("logit_scale_init_value", "initializer_factor")),
    ),
    names=_names,
    without_key=("family", "init_temperature", "pad_vocab_to"),
    files=lambda config: {"preprocessor_config.json": _image_processor(config)},
    tokens_in="text_config",
    read=_read,
    ignored=("vision_model.embeddings.position_ids", "text_model.embeddings.position_ids"),
)


class CLIPAdapter(HFAdapter[CLIPConfig]):
    """Images and captions, each of which ends with the id that its vector is taken at; logits [images, captions]."""

    architectures = (CLIP,)
    keeps_text_start = True  # of a caption; its end is added where captions are batched

    def sample(self, model: CLIPConfig, random: RandomInputs) -> Tensors:
        found = random.padded_ids(model.sequence_length)
        ends = found["mask"].sum(dim=1) - 1
        if random.end_id is None:
            raise ValueError("CLIP takes the vector of a caption at its end-of-text id, and config.json names none")
        return {**found, "ids": found["ids"].scatter(1, ends[:, None], random.end_id), "ends": ends,
                "pixels": random.normal(3, model.image_size, model.image_size)}

    def ours(self, sample: Tensors, model: TrainingModel) -> Tensors:
        image, text = model.run((sample["pixels"], sample["ids"], sample["ends"]))[:2]
        return {"logits": image @ text.t()}

    def theirs(self, sample: Tensors, model: Any) -> Tensors:
        return {"logits": model(input_ids=sample["ids"], pixel_values=sample["pixels"]).logits_per_image}

    def config_token_ids(self, special: SpecialIds, end_of_text: int, decoder_start: int) -> dict[str, int | None]:
        return {"eos_token_id": end_of_text}


ADAPTER = CLIPAdapter()
