"""BART in transformers (facts: no torch)."""

from pretrain.models.bart.spec import NUM_UNUSED_POSITIONS, BARTConfig
from pretrain.models.gpt.hf import ACTIVATIONS
from pretrain.models.hf_map import (
    DENSE,
    OF_A_MIXTURE,
    Architecture,
    Entry,
    Free,
    Grouped,
    Must,
    Only,
    Same,
    Told,
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


BART = Architecture(
    model_type="bart",
    class_name=lambda config: "BartForConditionalGeneration",
    fields=(
        Same("layers", "encoder_layers", 12),
        Same("decoder_layers", "decoder_layers", 12, value=lambda config: config.num_decoder_layers),
        Same("hidden", "d_model", 1024),
        Same("heads", "encoder_attention_heads", 16),
        Same("heads", "decoder_attention_heads", 16),
        Same("ffn", "encoder_ffn_dim", 4096, value=lambda config: config.ffn_hidden),
        Same("ffn", "decoder_ffn_dim", 4096, value=lambda config: config.ffn_hidden),
        Same("vocab_size", "vocab_size", 50265),
        Same("sequence_length", "max_position_embeddings", 1024,
             value=lambda config: config.num_positions - NUM_UNUSED_POSITIONS),
        Same("activation", "activation_function", "gelu", ACTIVATIONS),
        Same("dropout", "dropout", 0.1),
        Same("attention_dropout", "attention_dropout", 0.0),
        Same("init_std", "init_std", 0.02),
        Only("norm_epsilon", (1e-5,)),  # their norms have this one and no key for it
        DENSE,
        Told("activation_dropout", 0.0),
        Told("encoder_layerdrop", 0.0),
        Told("decoder_layerdrop", 0.0),
        Must("scale_embedding", False, False),
        Must("is_decoder", False, False),
        Must("is_encoder_decoder", True, True),
        Must("tie_word_embeddings", True, True),
        Must("normalize_before", False, False),
        Must("normalize_embedding", True, True),
        Must("add_final_layer_norm", False, False),
        Must("add_bias_logits", False, False),
        Must("static_position_embeddings", False, False),
        Free(("num_hidden_layers", "extra_pos_embeddings", "classif_dropout")),
    ),
    names=_names,
    free_of_ours=(*OF_A_MIXTURE, "family", "target_length", "max_positions", "pad_vocab_to"),
    copies=lambda config: dict.fromkeys(
        ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight"),
        "model.shared.weight"),
    zeros=("final_logits_bias",),
    prefix="model.",
)

ARCHITECTURES = (BART,)
