"""GPT decoders in transformers: GPT-2 for learned positions, Llama and its kin for rotary ones (no torch)."""

from __future__ import annotations

from typing import Any

from data_pipeline.corruption.special_ids import SpecialIds
from pretrain.models.gpt.spec import GPTConfig
from pretrain.models.hf_adapter import HFAdapter, RandomInputs, Tensors, TrainingModel
from pretrain.models.hf_map import (
    DENSE,
    OF_A_MIXTURE,
    Architecture,
    Entry,
    FieldRule,
    Ignored,
    Joined,
    Mapped,
    RequiredValue,
    SupportedValues,
    TrainingOnly,
    Transposed,
    attention_parts,
    vocabulary,
)

ACTIVATIONS = (("gelu_tanh", "gelu_new"), ("gelu_tanh", "gelu_pytorch_tanh"), ("gelu_tanh", "gelu_fast"),
               ("gelu", "gelu"), ("relu", "relu"))
WITHOUT_KEY = ("family", "dropout", "attention_dropout", "init_std", "pad_vocab_to")

# -- GPT-2 -------------------------------------------------------------------------------------------------------------


def _gpt2_names(config: GPTConfig) -> tuple[Entry, ...]:
    block, theirs = "blocks.{n}", "transformer.h.{n}"
    qkv = attention_parts(config.heads, config.heads, config.head_dim)
    return (
        Entry("embedding.table.weight", "transformer.wte.weight", (vocabulary(config),)),
        Entry("positions.weight", "transformer.wpe.weight"),
        Entry(f"{block}.attention_norm.{{p}}", f"{theirs}.ln_1.{{p}}"),
        Entry(f"{block}.attention.qkv.{{p}}", f"{theirs}.attn.c_attn.{{p}}",
              (qkv, Joined((config.hidden,) * 3), Transposed())),
        Entry(f"{block}.attention.out.{{p}}", f"{theirs}.attn.c_proj.{{p}}", (Transposed(),)),
        Entry(f"{block}.feed_forward_norm.{{p}}", f"{theirs}.ln_2.{{p}}"),
        Entry(f"{block}.feed_forward.up.{{p}}", f"{theirs}.mlp.c_fc.{{p}}", (Transposed(),)),
        Entry(f"{block}.feed_forward.down.{{p}}", f"{theirs}.mlp.c_proj.{{p}}", (Transposed(),)),
        Entry("final_norm.{p}", "transformer.ln_f.{p}"),
        Entry("head.weight", "lm_head.weight", (vocabulary(config),)),
    )


GPT2: Architecture[GPTConfig] = Architecture(
    model_type="gpt2",
    class_name=lambda config: "GPT2LMHeadModel",
    fields=(
        Mapped("layers", "n_layer", 12),
        Mapped("hidden", "n_embd", 768),
        Mapped("heads", "n_head", 12),
        Mapped("ffn", "n_inner", None, value=lambda config: config.ffn_hidden),
        Mapped("vocab_size", "vocab_size", 50257),
        Mapped("sequence_length", "n_positions", 1024),
        Mapped("activation", "activation_function", "gelu_new", ACTIVATIONS),
        Mapped("norm_epsilon", "layer_norm_epsilon", 1e-5),
        Mapped("tied_head", "tie_word_embeddings", True),
        Mapped("dropout", "resid_pdrop", 0.1),
        Mapped("dropout", "embd_pdrop", 0.1),
        Mapped("attention_dropout", "attn_pdrop", 0.1),
        Mapped("init_std", "initializer_range", 0.02),
        SupportedValues("positions", ("learned",)),
        SupportedValues("norm", ("layernorm",)),
        SupportedValues("norm_position", ("pre",)),
        SupportedValues("bias", (True,)),
        SupportedValues("kv_heads", (True,), value=lambda config: config.num_kv_heads == config.heads, implied=True),
        DENSE,
        RequiredValue("scale_attn_weights", True, True),
        RequiredValue("scale_attn_by_inverse_layer_idx", False, False),
        RequiredValue("add_cross_attention", False, False),
        Ignored(("reorder_and_upcast_attn", "n_ctx", "summary_type", "summary_use_proj", "summary_activation",
                 "summary_proj_to_labels", "summary_first_dropout")),
    ),
    names=_gpt2_names,
    without_key=(*WITHOUT_KEY, *OF_A_MIXTURE, "rotary_base"),
    copies=lambda config: {"lm_head.weight": "transformer.wte.weight"} if config.tied_head else {},
    ignored=("transformer.h.{n}.attn.bias", "transformer.h.{n}.attn.masked_bias"),
    prefix="transformer.",
)

# -- Llama, Mistral, Mixtral -------------------------------------------------------------------------------------------


def _llama_names(config: GPTConfig) -> tuple[Entry, ...]:
    block, theirs = "blocks.{n}.feed_forward", "model.layers.{n}.mlp"
    return (*_without_feed_forward(config),
            *(Entry(f"{block}.{part}.{{p}}", f"{theirs}.{part}_proj.{{p}}") for part in ("gate", "up", "down")))


def _mixtral_names(config: GPTConfig) -> tuple[Entry, ...]:
    block, theirs = "blocks.{n}.feed_forward", "model.layers.{n}.block_sparse_moe"
    parts = {"gate": "w1", "up": "w3", "down": "w2"}
    return (*_without_feed_forward(config),
            Entry(f"{block}.router.weight", f"{theirs}.gate.weight"),
            *(Entry(f"{block}.experts.{{e}}.{mine}.weight", f"{theirs}.experts.{{e}}.{name}.weight")
              for mine, name in parts.items()))


def _without_feed_forward(config: GPTConfig) -> tuple[Entry, ...]:
    block, theirs = "blocks.{n}", "model.layers.{n}"
    qkv = attention_parts(config.heads, config.num_kv_heads, config.head_dim)
    return (
        Entry("embedding.table.weight", "model.embed_tokens.weight", (vocabulary(config),)),
        Entry(f"{block}.attention_norm.weight", f"{theirs}.input_layernorm.weight"),
        Entry(f"{block}.attention.qkv.{{p}}",
              tuple(f"{theirs}.self_attn.{part}_proj.{{p}}" for part in "qkv"), (qkv,)),
        Entry(f"{block}.attention.out.{{p}}", f"{theirs}.self_attn.o_proj.{{p}}"),
        Entry(f"{block}.feed_forward_norm.weight", f"{theirs}.post_attention_layernorm.weight"),
        Entry("final_norm.weight", "model.norm.weight"),
        Entry("head.weight", "lm_head.weight", (vocabulary(config),)),
    )


def rope_read(values: dict[str, Any]) -> dict[str, Any]:
    """The base of the rotary wavelengths from where newer files hold it; a width of heads that follows from others."""
    values = dict(values)
    rope = dict(values.pop("rope_parameters", None) or {})
    if "rope_theta" in rope:
        values["rope_theta"] = rope.pop("rope_theta")
    if rope.pop("rope_type", "default") != "default" or rope.pop("partial_rotary_factor", 1.0) != 1.0 or rope:
        values["rope_scaling"] = "as in rope_parameters"
    hidden, heads = values.get("hidden_size", 4096), values.get("num_attention_heads", 32)
    if isinstance(hidden, int) and isinstance(heads, int) and heads and values.get("head_dim") == hidden // heads:
        del values["head_dim"]
    return values


def window_read(values: dict[str, Any]) -> dict[str, Any]:
    """A window that is at least as long as the model's sequences leaves nothing out."""
    values = rope_read(values)
    window, length = values.get("sliding_window"), values.get("max_position_embeddings", 4096 * 32)
    if isinstance(window, int) and isinstance(length, int) and length <= window:
        values["sliding_window"] = None
    return values


def llama_fields(*, max_positions: int, ffn: int, kv_heads: int | None, norm_epsilon: float, rotary_base: float
                 ) -> tuple[FieldRule[GPTConfig], ...]:
    """What Llama and its descendants share; the arguments are the defaults in which they differ."""
    return (
        Mapped("layers", "num_hidden_layers", 32),
        Mapped("hidden", "hidden_size", 4096),
        Mapped("heads", "num_attention_heads", 32),
        Mapped("kv_heads", "num_key_value_heads", kv_heads, value=lambda config: config.num_kv_heads),
        Mapped("ffn", "intermediate_size", ffn, value=lambda config: config.expert_width or config.ffn_hidden),
        Mapped("vocab_size", "vocab_size", 32000),
        Mapped("sequence_length", "max_position_embeddings", max_positions),
        Mapped("activation", "hidden_act", "silu", (("swiglu", "silu"), ("swiglu", "swish"))),
        Mapped("norm_epsilon", "rms_norm_eps", norm_epsilon),
        Mapped("rotary_base", "rope_theta", rotary_base),
        Mapped("tied_head", "tie_word_embeddings", False),
        Mapped("attention_dropout", "attention_dropout", 0.0),
        Mapped("init_std", "initializer_range", 0.02),
        SupportedValues("positions", ("rotary",)),
        SupportedValues("norm", ("rmsnorm",)),
        SupportedValues("norm_position", ("pre",)),
        RequiredValue("rope_scaling", None, None, "take a model with unscaled rotary positions"),
        RequiredValue("head_dim", None, None, "take a model whose heads are hidden_size / num_attention_heads wide"),
    )


def _tied(config: GPTConfig) -> dict[str, str]:
    return {"lm_head.weight": "model.embed_tokens.weight"} if config.tied_head else {}


LLAMA: Architecture[GPTConfig] = Architecture(
    model_type="llama",
    class_name=lambda config: "LlamaForCausalLM",
    fields=(
        *llama_fields(max_positions=2048, ffn=11008, kv_heads=None, norm_epsilon=1e-6, rotary_base=10000.0),
        Mapped("bias", "attention_bias", False),
        Mapped("bias", "mlp_bias", False),
        DENSE,
        Ignored(("pretraining_tp",)),
    ),
    names=_llama_names,
    without_key=(*WITHOUT_KEY, *OF_A_MIXTURE),
    copies=_tied,
    ignored=("model.layers.{n}.self_attn.rotary_emb.inv_freq",),
    prefix="model.",
    read=rope_read,
)

WHOLE_WINDOW = "set max_position_embeddings in config.json to at most sliding_window: up to there attention is whole"

MISTRAL: Architecture[GPTConfig] = Architecture(
    model_type="mistral",
    class_name=lambda config: "MistralForCausalLM",
    fields=(
        *llama_fields(max_positions=4096 * 32, ffn=14336, kv_heads=8, norm_epsilon=1e-6, rotary_base=10000.0),
        SupportedValues("bias", (False,)),
        DENSE,
        RequiredValue("sliding_window", None, 4096, WHOLE_WINDOW),
    ),
    names=_llama_names,
    without_key=(*WITHOUT_KEY, *OF_A_MIXTURE),
    copies=_tied,
    ignored=("model.layers.{n}.self_attn.rotary_emb.inv_freq",),
    prefix="model.",
    read=window_read,
)

MIXTRAL: Architecture[GPTConfig] = Architecture(
    model_type="mixtral",
    class_name=lambda config: "MixtralForCausalLM",
    fields=(
        *llama_fields(max_positions=4096 * 32, ffn=14336, kv_heads=8, norm_epsilon=1e-5, rotary_base=1e6),
        Mapped("experts", "num_local_experts", 8),
        SupportedValues("experts", (True,), value=lambda config: config.experts > 0, implied=True),
        Mapped("top_k", "num_experts_per_tok", 2),
        Mapped("balance_loss", "router_aux_loss_coef", 0.001),
        SupportedValues("router", ("top_k_softmax",)),
        SupportedValues("expert_every", (1,)),
        SupportedValues("shared_expert_ffn", (None,)),
        SupportedValues("bias_rate", (0.0,)),
        SupportedValues("bias", (False,)),
        RequiredValue("sliding_window", None, None, WHOLE_WINDOW),
        TrainingOnly("router_jitter_noise", 0.0),
        Ignored(("output_router_logits",)),
    ),
    names=_mixtral_names,
    without_key=(*WITHOUT_KEY, "expert_ffn", "capacity_factor", "z_loss"),
    copies=_tied,
    prefix="model.",
    read=window_read,
)


class GPTAdapter(HFAdapter[GPTConfig]):
    """One sequence of tokens; logits [real tokens, v], since no token sees a later one and padding is at the end."""

    architectures = (GPT2, LLAMA, MISTRAL, MIXTRAL)
    text_separators = ("bos_token", "eos_token", "sep_token")  # a decoder sees the token before a text

    def sample(self, model: GPTConfig, random: RandomInputs) -> Tensors:
        return random.padded_ids(model.sequence_length)

    def ours(self, sample: Tensors, model: TrainingModel) -> Tensors:
        return {"logits": model.logits(model.run(sample["ids"]))[sample["mask"].bool()]}

    def theirs(self, sample: Tensors, model: Any) -> Tensors:
        outputs = model(input_ids=sample["ids"], attention_mask=sample["mask"])
        return {"logits": outputs.logits[sample["mask"].bool()]}

    def config_token_ids(self, special: SpecialIds, end_of_text: int, decoder_start: int) -> dict[str, int | None]:
        return {"bos_token_id": end_of_text, "eos_token_id": end_of_text}


ADAPTER = GPTAdapter()
