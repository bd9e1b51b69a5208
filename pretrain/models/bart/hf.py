"""BART in transformers (no torch)."""

from pretrain.models.bart.spec import NUM_UNUSED_POSITIONS, BARTConfig
from pretrain.models.encoder_decoder_hf import EncoderDecoderAdapter
from pretrain.models.gpt.hf import ACTIVATIONS
from pretrain.models.hf_map import (
    DENSE,
    OF_A_MIXTURE,
    Architecture,
    Entry,
    Grouped,
    Ignored,
    Mapped,
    RequiredValue,
    SupportedValues,
    TrainingOnly,
    attention_parts,
    vocabulary,
)


def _side_names(config: BARTConfig, side: str) -> tuple[Entry, ...]:
    block, theirs = f"{side}.blocks.{{n}}", f"model.{side}.layers.{{n}}"
    width = config.hidden // config.heads
    entries = (
        Entry(f"{side}.input.positions", f"model.{side}.embed_positions.weight"),
        Entry(f"{side}.input.norm.{{p}}", f"model.{side}.layernorm_embedding.{{p}}"),
        Entry(f"{block}.attention.qkv.{{p}}", tuple(f"{theirs}.self_attn.{part}_proj.{{p}}" for part in "qkv"),
              (attention_parts(config.heads, config.heads, width),)),
        Entry(f"{block}.attention.out.{{p}}", f"{theirs}.self_attn.out_proj.{{p}}"),
        Entry(f"{block}.attention_norm.{{p}}", f"{theirs}.self_attn_layer_norm.{{p}}"),
        Entry(f"{block}.feed_forward.up.{{p}}", f"{theirs}.fc1.{{p}}"),
        Entry(f"{block}.feed_forward.down.{{p}}", f"{theirs}.fc2.{{p}}"),
        Entry(f"{block}.feed_forward_norm.{{p}}", f"{theirs}.final_layer_norm.{{p}}"),
    )
    if side == "encoder":
        return entries
    return (
        *entries,
        Entry(f"{block}.cross_norm.{{p}}", f"{theirs}.encoder_attn_layer_norm.{{p}}"),
        Entry(f"{block}.cross_attention.q.{{p}}", f"{theirs}.encoder_attn.q_proj.{{p}}"),
        Entry(f"{block}.cross_attention.kv.{{p}}",
              (f"{theirs}.encoder_attn.k_proj.{{p}}", f"{theirs}.encoder_attn.v_proj.{{p}}"),
              (Grouped(config.heads, (width, width)),)),
        Entry(f"{block}.cross_attention.out.{{p}}", f"{theirs}.encoder_attn.out_proj.{{p}}"),
    )


def _names(config: BARTConfig) -> tuple[Entry, ...]:
    table = Entry("embedding.table.weight", "model.shared.weight", (vocabulary(config),))
    return table, *_side_names(config, "encoder"), *_side_names(config, "decoder")


BART: Architecture[BARTConfig] = Architecture(
    model_type="bart",
    class_name=lambda config: "BartForConditionalGeneration",
    fields=(
        Mapped("layers", "encoder_layers", 12),
        Mapped("decoder_layers", "decoder_layers", 12, value=lambda config: config.num_decoder_layers),
        Mapped("hidden", "d_model", 1024),
        Mapped("heads", "encoder_attention_heads", 16),
        Mapped("heads", "decoder_attention_heads", 16),
        Mapped("ffn", "encoder_ffn_dim", 4096, value=lambda config: config.ffn_hidden),
        Mapped("ffn", "decoder_ffn_dim", 4096, value=lambda config: config.ffn_hidden),
        Mapped("vocab_size", "vocab_size", 50265),
        Mapped("sequence_length", "max_position_embeddings", 1024,
               value=lambda config: config.num_positions - NUM_UNUSED_POSITIONS),
        Mapped("activation", "activation_function", "gelu", ACTIVATIONS),
        Mapped("dropout", "dropout", 0.1),
        Mapped("attention_dropout", "attention_dropout", 0.0),
        Mapped("init_std", "init_std", 0.02),
        SupportedValues("norm_epsilon", (1e-5,)),  # their norms have this one and no key for it
        DENSE,
        TrainingOnly("activation_dropout", 0.0),
        TrainingOnly("encoder_layerdrop", 0.0),
        TrainingOnly("decoder_layerdrop", 0.0),
        RequiredValue("scale_embedding", False, False),
        RequiredValue("is_decoder", False, False),
        RequiredValue("is_encoder_decoder", True, True),
        RequiredValue("tie_word_embeddings", True, True),
        RequiredValue("normalize_before", False, False),
        RequiredValue("normalize_embedding", True, True),
        RequiredValue("add_final_layer_norm", False, False),
        RequiredValue("add_bias_logits", False, False),
        RequiredValue("static_position_embeddings", False, False),
        Ignored(("num_hidden_layers", "extra_pos_embeddings", "classif_dropout")),
    ),
    names=_names,
    without_key=(*OF_A_MIXTURE, "family", "target_length", "max_positions", "pad_vocab_to"),
    copies=lambda config: dict.fromkeys(
        ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight"),
        "model.shared.weight"),
    zeros=("final_logits_bias",),
    prefix="model.",
)


class BARTAdapter(EncoderDecoderAdapter[BARTConfig]):
    """BART."""

    architectures = (BART,)


ADAPTER = BARTAdapter()
