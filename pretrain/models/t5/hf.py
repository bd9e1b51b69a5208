"""T5 in transformers, both versions, and Switch, its mixtures of experts (no torch)."""

from collections.abc import Mapping
from itertools import chain
from typing import Any

from pretrain.models.encoder_decoder_hf import EncoderDecoderAdapter
from pretrain.models.hf_map import (
    DENSE,
    OF_A_MIXTURE,
    Architecture,
    Entry,
    FieldRule,
    Grouped,
    Ignored,
    Mapped,
    RequiredValue,
    SupportedValues,
    TrainingOnly,
    attention_parts,
    vocabulary,
)
from pretrain.models.t5.spec import T5Config


def _feed_forward_names(config: T5Config, block: str, theirs: str) -> tuple[Entry, ...]:
    """The matrices of a feed-forward part; with a gate there are two first ones, and the gate is number 0."""
    down = Entry(f"{block}.feed_forward.down.weight", f"{theirs}.wo.weight")
    if config.activation == "relu":
        return Entry(f"{block}.feed_forward.up.weight", f"{theirs}.wi.weight"), down
    return (Entry(f"{block}.feed_forward.gate.weight", f"{theirs}.wi_0.weight"),
            Entry(f"{block}.feed_forward.up.weight", f"{theirs}.wi_1.weight"), down)


def _side_names(config: T5Config, side: str) -> tuple[Entry, ...]:
    """A side without the matrices of its feed-forward parts."""
    block, layers, last = f"{side}.blocks.{{n}}", f"{side}.block.{{n}}.layer", "2" if side == "decoder" else "1"
    attention = f"{layers}.0.SelfAttention"
    entries = (
        Entry(f"{side}.bias.weight", f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
        Entry(f"{block}.attention_norm.weight", f"{layers}.0.layer_norm.weight"),
        Entry(f"{block}.attention.qkv.weight", tuple(f"{attention}.{part}.weight" for part in "qkv"),
              (attention_parts(config.heads, config.heads, config.head_dim),)),
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
              (Grouped(config.heads, (config.head_dim, config.head_dim)),)),
        Entry(f"{block}.cross_attention.out.weight", f"{cross}.o.weight"),
    )


def _without_feed_forward(config: T5Config) -> tuple[Entry, ...]:
    return (
        Entry("embedding.table.weight", "shared.weight", (vocabulary(config),)),
        *_side_names(config, "encoder"),
        *_side_names(config, "decoder"),
        Entry("head.weight", "lm_head.weight", (vocabulary(config),)),
    )


_PLACES = (("encoder.blocks.{n}", "encoder.block.{n}.layer.1"), ("decoder.blocks.{n}", "decoder.block.{n}.layer.2"))


def _t5_names(config: T5Config) -> tuple[Entry, ...]:
    parts = [_feed_forward_names(config, block, f"{theirs}.DenseReluDense") for block, theirs in _PLACES]
    return *_without_feed_forward(config), *chain(*parts)


def _switch_names(config: T5Config) -> tuple[Entry, ...]:
    entries = list(_without_feed_forward(config))
    for block, layer in _PLACES:
        mine, theirs = f"{block}.feed_forward", f"{layer}.mlp"
        entries.append(Entry(f"{mine}.router.weight", f"{theirs}.router.classifier.weight"))
        for part, name in (("up", "wi"), ("down", "wo")):
            entries += [Entry(f"{mine}.{part}.weight", f"{theirs}.{name}.weight"),
                        Entry(f"{mine}.experts.{{e}}.{part}.weight", f"{theirs}.experts.expert_{{e}}.{name}.weight")]
    return tuple(entries)


def _copies(config: T5Config) -> dict[str, str]:
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


WITHOUT_KEY = ("family", "attention_dropout", "target_length", "pad_vocab_to")


def _fields(layers: int, decoder_layers: int | None, hidden: int, heads: int) -> tuple[FieldRule[T5Config], ...]:
    """What T5 and Switch share; the arguments are the defaults in which they differ."""
    return (
        Mapped("layers", "num_layers", layers),
        Mapped("decoder_layers", "num_decoder_layers", decoder_layers, value=lambda config: config.num_decoder_layers),
        Mapped("hidden", "d_model", hidden),
        Mapped("heads", "num_heads", heads),
        Mapped("head_width", "d_kv", 64, value=lambda config: config.head_dim),
        Mapped("ffn", "d_ff", 2048, value=lambda config: config.ffn_hidden),
        Mapped("vocab_size", "vocab_size", 32128),
        Mapped("sequence_length", "n_positions", 512),
        Mapped("tied_head", "tie_word_embeddings", True),
        Mapped("relative_buckets", "relative_attention_num_buckets", 32),
        Mapped("relative_max_distance", "relative_attention_max_distance", 128),
        Mapped("norm_epsilon", "layer_norm_epsilon", 1e-6),
        Mapped("dropout", "dropout_rate", 0.1),
        RequiredValue("is_decoder", False, False),
        RequiredValue("is_encoder_decoder", True, True),
    )


T5: Architecture[T5Config] = Architecture(
    model_type="t5",
    class_name=lambda config: "T5ForConditionalGeneration",
    fields=(
        *_fields(layers=6, decoder_layers=None, hidden=512, heads=8),
        Mapped("activation", "feed_forward_proj", "relu", (("relu", "relu"), ("geglu_tanh", "gated-gelu"))),
        DENSE,
        Ignored(("initializer_factor", "dense_act_fn", "is_gated_act", "classifier_dropout")),
    ),
    names=_t5_names,
    without_key=(*WITHOUT_KEY, *OF_A_MIXTURE),
    copies=_copies,
    stand_ins=stand_ins,
    ignored=("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",),
    read=_read,
)

# -- Switch ------------------------------------------------------------------------------------------------------------

REGULAR = "every n-th block"
NO_CAPACITY = 1 << 20  # tokens of one sequence that an expert takes: more than a sequence has


def _sparse(layers: int, num_sparse: int) -> list[int]:
    """Blocks of a side that are mixtures; the rule of SwitchTransformersStack and its config."""
    step = layers // num_sparse if num_sparse > 0 else layers
    return [index for index in range(layers) if step == 1 or (step > 1 and index % step == 1)]


def _every(layers: int, sparse: list[int]) -> int | None:
    """The n for which every n-th block is sparse; None where there is none."""
    return next((n for n in range(1, layers + 1) if [i for i in range(layers) if (i + 1) % n == 0] == sparse), None)


def _switch_read(values: dict[str, Any]) -> dict[str, Any]:
    """Which blocks are mixtures, as expert_every; a capacity that no sequence reaches is none."""
    values = {"num_layers": 12, "num_sparse_encoder_layers": 3, "num_sparse_decoder_layers": 3, "expert_capacity": 64,
              "n_positions": 512, **values}
    layers = values["num_layers"]
    decoder_layers = values.get("num_decoder_layers", 12)
    sides = ((layers, values["num_sparse_encoder_layers"]),
             (layers if decoder_layers is None else decoder_layers, values["num_sparse_decoder_layers"]))
    if all(isinstance(number, int) for side in sides for number in side):
        sparse = [_sparse(*side) for side in sides]
        found = {_every(count, blocks) for (count, _), blocks in zip(sides, sparse, strict=True)}
        values["expert_every"] = next(iter(found))
        values["num_sparse_encoder_layers"] = REGULAR if len(found) == 1 and None not in found else \
            " and ".join(f"blocks {', '.join(map(str, blocks))}" for blocks in sparse)
    del values["num_sparse_decoder_layers"]
    if isinstance(values["expert_capacity"], int) and isinstance(values["n_positions"], int) \
            and values["expert_capacity"] >= values["n_positions"]:
        values["expert_capacity"] = NO_CAPACITY
    return values


def _switch_write(values: dict[str, Any]) -> dict[str, Any]:
    every = values["expert_every"]
    sides = {"encoder": values["num_layers"], "decoder": values["num_decoder_layers"]}
    return {key: value for key, value in values.items() if key != "expert_every"} | {
        f"num_sparse_{side}_layers": layers // every for side, layers in sides.items()}


def _as_there(config: T5Config) -> bool:
    """Whether some number of sparse blocks gives those of this config."""
    return all(_every(count, _sparse(count, count // config.expert_every)) == config.expert_every
               for count in (config.layers, config.num_decoder_layers))


SWITCH: Architecture[T5Config] = Architecture(
    model_type="switch_transformers",
    class_name=lambda config: "SwitchTransformersForConditionalGeneration",
    fields=(
        *_fields(layers=12, decoder_layers=12, hidden=768, heads=12),
        Mapped("activation", "dense_act_fn", "relu", (("relu", "relu"),)),
        Mapped("experts", "num_experts", 8),
        Mapped("expert_every", "expert_every", 1),
        RequiredValue("num_sparse_encoder_layers", REGULAR, REGULAR, "take a model where these are the last of every n "
                      "blocks, and the n of encoder and decoder is one"),
        Mapped("balance_loss", "router_aux_loss_coef", 0.001),
        Mapped("z_loss", "router_z_loss_coef", 0.001),
        SupportedValues("tied_head", (True,), implied=True),  # untied, their sides have token tables of their own
        SupportedValues("experts", (True,), value=lambda config: config.experts > 0, implied=True),
        SupportedValues("expert_every", (True,), value=_as_there, implied=True),
        SupportedValues("expert_ffn", (True,), value=lambda config: config.expert_width == config.ffn_hidden,
                        implied=True),
        SupportedValues("top_k", (1,)),
        SupportedValues("router", ("softmax_top_k",)),
        SupportedValues("shared_expert_ffn", (None,)),
        SupportedValues("bias_rate", (0.0,)),
        RequiredValue("expert_capacity", NO_CAPACITY, NO_CAPACITY, "set expert_capacity in config.json to n_positions "
                      "(512 where it is not said) or more: here no token is dropped outside of training"),
        RequiredValue("add_cross_attention", False, False),
        RequiredValue("router_bias", False, False),
        RequiredValue("router_dtype", "float32", "float32"),
        TrainingOnly("router_jitter_noise", 0.0),
        Ignored(("initializer_factor", "router_ignore_padding_tokens", "add_router_probs", "encoder_sparse_step",
                 "decoder_sparse_step")),
    ),
    names=_switch_names,
    without_key=(*WITHOUT_KEY, "capacity_factor"),
    copies=_copies,
    read=_switch_read,
    write=_switch_write,
)


class T5Adapter(EncoderDecoderAdapter[T5Config]):
    """T5 and Switch."""

    architectures = (T5, SWITCH)


ADAPTER = T5Adapter()
