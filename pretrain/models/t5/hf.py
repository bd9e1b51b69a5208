"""T5 in transformers, both versions (facts: no torch)."""

from collections.abc import Mapping
from typing import Any

from pretrain.models.hf_map import (
    Architecture,
    Entry,
    Free,
    Grouped,
    Must,
    Same,
    attention_parts,
    vocabulary,
)
from pretrain.models.t5.spec import T5Config


def feed_forward_names(config: T5Config, block: str, theirs: str) -> tuple[Entry, ...]:
    """The matrices of a feed-forward part; with a gate there are two first ones, and the gate is number 0."""
    down = Entry(f"{block}.feed_forward.down.weight", f"{theirs}.wo.weight")
    if config.activation == "relu":
        return Entry(f"{block}.feed_forward.up.weight", f"{theirs}.wi.weight"), down
    return (Entry(f"{block}.feed_forward.gate.weight", f"{theirs}.wi_0.weight"),
            Entry(f"{block}.feed_forward.up.weight", f"{theirs}.wi_1.weight"), down)


def side_names(config: T5Config, side: str) -> tuple[Entry, ...]:
    """A side without the matrices of its feed-forward parts."""
    block, layers, last = f"{side}.blocks.{{n}}", f"{side}.block.{{n}}.layer", "2" if side == "decoder" else "1"
    attention = f"{layers}.0.SelfAttention"
    entries = (
        Entry(f"{side}.bias.weight", f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
        Entry(f"{block}.attention_norm.weight", f"{layers}.0.layer_norm.weight"),
        Entry(f"{block}.attention.qkv.weight", tuple(f"{attention}.{part}.weight" for part in "qkv"),
              (attention_parts(config.heads, config.heads, config.width),)),
        Entry(f"{block}.attention.out.weight", f"{attention}.o.weight"),
        Entry(f"{block}.feed_forward_norm.weight", f"{layers}.{last}.layer_norm.weight"),
        Entry(f"{side}.final_norm.weight", f"{side}.final_layer_norm.weight"),
    )
    if side == "encoder":
        return entries
    cross = f"{layers}.1.EncDecAttention"
    return (
        *entries,
        Entry(f"{block}.cross_norm.weight", f"{layers}.1.layer_norm.weight"),
        Entry(f"{block}.cross_attention.q.weight", f"{cross}.q.weight"),
        Entry(f"{block}.cross_attention.kv.weight", (f"{cross}.k.weight", f"{cross}.v.weight"),
              (Grouped(config.heads, (config.width, config.width)),)),
        Entry(f"{block}.cross_attention.out.weight", f"{cross}.o.weight"),
    )


def _names(config: T5Config) -> tuple[Entry, ...]:
    return (
        Entry("embedding.table.weight", "shared.weight", (vocabulary(config),)),
        *side_names(config, "encoder"),
        *feed_forward_names(config, "encoder.blocks.{n}", "encoder.block.{n}.layer.1.DenseReluDense"),
        *side_names(config, "decoder"),
        *feed_forward_names(config, "decoder.blocks.{n}", "decoder.block.{n}.layer.2.DenseReluDense"),
        Entry("head.weight", "lm_head.weight", (vocabulary(config),)),
    )


def copies(config: T5Config) -> dict[str, str]:
    """Where else a folder may hold the token table."""
    sides = {f"{side}.embed_tokens.weight": "shared.weight" for side in ("encoder", "decoder")}
    return {**sides, "lm_head.weight": "shared.weight"} if config.tied_head else sides


def stand_ins(values: Mapping[str, Any]) -> dict[str, str]:
    """transformers 5 also ties a head that is not scaled (version 1.1) unless both tensors are there."""
    return {"lm_head.weight": "shared.weight"} if values.get("tie_word_embeddings", True) else {}


def _read(values: dict[str, Any]) -> dict[str, Any]:
    """transformers 5 writes the scaled head under a name of its own, and calls every model tied."""
    values = dict(values)
    if "scale_decoder_outputs" in values:
        values["tie_word_embeddings"] = values.pop("scale_decoder_outputs")
    return values


T5 = Architecture(
    model_type="t5",
    class_name=lambda config: "T5ForConditionalGeneration",
    fields=(
        Same("layers", "num_layers", 6),
        Same("decoder_layers", "num_decoder_layers", None, value=lambda config: config.num_decoder_layers),
        Same("hidden", "d_model", 512),
        Same("heads", "num_heads", 8),
        Same("head_width", "d_kv", 64, value=lambda config: config.width),
        Same("ffn", "d_ff", 2048, value=lambda config: config.ffn_hidden),
        Same("vocab_size", "vocab_size", 32128),
        Same("sequence_length", "n_positions", 512),
        Same("activation", "feed_forward_proj", "relu", (("relu", "relu"), ("geglu_tanh", "gated-gelu"))),
        Same("tied_head", "tie_word_embeddings", True),
        Same("relative_buckets", "relative_attention_num_buckets", 32),
        Same("relative_max_distance", "relative_attention_max_distance", 128),
        Same("norm_epsilon", "layer_norm_epsilon", 1e-6),
        Same("dropout", "dropout_rate", 0.1),
        Must("is_decoder", False, False),
        Must("is_encoder_decoder", True, True),
        Free(("initializer_factor", "dense_act_fn", "is_gated_act", "classifier_dropout")),
    ),
    names=_names,
    free_of_ours=("family", "attention_dropout", "target_length", "pad_vocab_to"),
    copies=copies,
    stand_ins=stand_ins,
    ignored=("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",),
    read=_read,
)

ARCHITECTURES = (T5,)
