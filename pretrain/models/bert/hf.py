"""BERT and RoBERTa in transformers (no torch)."""

from __future__ import annotations

from typing import Any

from data_pipeline.corruption.special_ids import SpecialIds
from pretrain.models.bert.spec import BERTConfig
from pretrain.models.gpt.hf import ACTIVATIONS
from pretrain.models.hf_adapter import HFAdapter, RandomInputs, Tensors, TokenName, TokenNames, TrainingModel
from pretrain.models.hf_map import (
    Architecture,
    Entry,
    FieldRule,
    IfTensorPresent,
    Mapped,
    RequiredValue,
    Rows,
    SupportedValues,
    attention_parts,
    vocabulary,
)


def _body(config: BERTConfig, model: str, positions: Entry) -> tuple[Entry, ...]:
    block, theirs = "blocks.{n}", f"{model}.encoder.layer.{{n}}"
    qkv = attention_parts(config.heads, config.heads, config.hidden // config.heads)
    return (
        Entry("embedding.table.weight", f"{model}.embeddings.word_embeddings.weight", (vocabulary(config),)),
        positions,
        Entry("input.types", f"{model}.embeddings.token_type_embeddings.weight"),
        Entry("input.norm.{p}", f"{model}.embeddings.LayerNorm.{{p}}"),
        Entry(f"{block}.attention.qkv.{{p}}",
              tuple(f"{theirs}.attention.self.{part}.{{p}}" for part in ("query", "key", "value")), (qkv,)),
        Entry(f"{block}.attention.out.{{p}}", f"{theirs}.attention.output.dense.{{p}}"),
        Entry(f"{block}.attention_norm.{{p}}", f"{theirs}.attention.output.LayerNorm.{{p}}"),
        Entry(f"{block}.feed_forward.up.{{p}}", f"{theirs}.intermediate.dense.{{p}}"),
        Entry(f"{block}.feed_forward.down.{{p}}", f"{theirs}.output.dense.{{p}}"),
        Entry(f"{block}.feed_forward_norm.{{p}}", f"{theirs}.output.LayerNorm.{{p}}"),
    )


def _bert_names(config: BERTConfig) -> tuple[Entry, ...]:
    # Positions are counted from row 0 there; rows that ours begins with and does not use stay behind.
    positions = Entry("input.positions", "bert.embeddings.position_embeddings.weight",
                      (Rows(config.position_offset, config.num_positions, config.num_positions),))
    return (
        *_body(config, "bert", positions),
        Entry("head.bias", "cls.predictions.bias", (vocabulary(config),)),
        Entry("head.dense.{p}", "cls.predictions.transform.dense.{p}"),
        Entry("head.norm.{p}", "cls.predictions.transform.LayerNorm.{p}"),
        Entry("head.pooler.{p}", "bert.pooler.dense.{p}"),
        Entry("head.judge.{p}", "cls.seq_relationship.{p}"),
    )


def _roberta_names(config: BERTConfig) -> tuple[Entry, ...]:
    return (
        *_body(config, "roberta", Entry("input.positions", "roberta.embeddings.position_embeddings.weight")),
        Entry("head.bias", "lm_head.bias", (vocabulary(config),)),
        Entry("head.dense.{p}", "lm_head.dense.{p}"),
        Entry("head.norm.{p}", "lm_head.layer_norm.{p}"),
    )


_FIELDS: tuple[FieldRule[BERTConfig], ...] = (
    Mapped("layers", "num_hidden_layers", 12),
    Mapped("hidden", "hidden_size", 768),
    Mapped("heads", "num_attention_heads", 12),
    Mapped("ffn", "intermediate_size", 3072, value=lambda config: config.ffn_hidden),
    Mapped("sequence_length", "max_position_embeddings", 512,
           value=lambda config: config.num_positions - config.position_offset),
    Mapped("segment_types", "type_vocab_size", 2),
    Mapped("activation", "hidden_act", "gelu", ACTIVATIONS),
    Mapped("norm_epsilon", "layer_norm_eps", 1e-12),
    Mapped("dropout", "hidden_dropout_prob", 0.1),
    Mapped("attention_dropout", "attention_probs_dropout_prob", 0.1),
    Mapped("init_std", "initializer_range", 0.02),
    RequiredValue("is_decoder", False, False),
    RequiredValue("add_cross_attention", False, False),
    RequiredValue("tie_word_embeddings", True, True),
    RequiredValue("position_embedding_type", "absolute", "absolute"),
    SupportedValues("shared_blocks", (False,)),
)
_WITHOUT_KEY = ("family", "max_positions", "pad_vocab_to")


def _roberta_read(values: dict[str, Any]) -> dict[str, Any]:
    """Positions follow the padding's id there: the table begins with as many unused rows as ids up to it."""
    values = dict(values)
    pad, rows = values.get("pad_token_id", 1), values.get("max_position_embeddings", 512)
    if isinstance(pad, int) and isinstance(rows, int):
        values |= {"position_offset": pad + 1, "max_position_embeddings": rows - pad - 1}
    return values


def _roberta_write(values: dict[str, Any]) -> dict[str, Any]:
    values = dict(values)
    offset = values.pop("position_offset")
    rows = values["max_position_embeddings"] + offset
    return values | {"pad_token_id": offset - 1, "max_position_embeddings": rows}


BERT: Architecture[BERTConfig] = Architecture(
    model_type="bert",
    class_name=lambda config: "BertForPreTraining" if config.next_sentence else "BertForMaskedLM",
    fields=(
        *_FIELDS,
        Mapped("vocab_size", "vocab_size", 30522),
        IfTensorPresent("next_sentence", "cls.seq_relationship.weight"),
    ),
    names=_bert_names,
    without_key=(*_WITHOUT_KEY, "position_offset"),
    copies=lambda config: {"cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
                           "cls.predictions.decoder.bias": "cls.predictions.bias"},
    ignored=("bert.embeddings.position_ids",),
    prefix="bert.",
    renamed=(("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")),
)

ROBERTA: Architecture[BERTConfig] = Architecture(
    model_type="roberta",
    class_name=lambda config: "RobertaForMaskedLM",
    fields=(
        *_FIELDS,
        Mapped("vocab_size", "vocab_size", 50265),
        Mapped("position_offset", "position_offset"),
        SupportedValues("position_offset", (True,), value=lambda config: config.position_offset > 0, implied=True),
        SupportedValues("next_sentence", (False,)),
    ),
    names=_roberta_names,
    without_key=_WITHOUT_KEY,
    copies=lambda config: {"lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
                           "lm_head.decoder.bias": "lm_head.bias"},
    ignored=("roberta.embeddings.position_ids",),
    prefix="roberta.",
    read=_roberta_read,
    write=_roberta_write,
    pads_with=lambda config: config.position_offset - 1,
)


class BERTAdapter(HFAdapter[BERTConfig]):
    """Padded tokens with a segment type for each sample; logits [real tokens, v], and [n, 2] of next sentences."""

    # BERT first: in RoBERTa's folder the id below the offset is padding at every place, and here it may be text.
    architectures = (BERT, ROBERTA)
    token_names = TokenNames(
        pad=TokenName("[PAD]", ("pad_token",)), start=TokenName("[CLS]", ("cls_token", "bos_token")),
        separator=TokenName("[SEP]", ("sep_token",)), mask=TokenName("[MASK]", ("mask_token",)))

    def sample(self, model: BERTConfig, random: RandomInputs) -> Tensors:
        found = random.padded_ids(model.sequence_length)
        types = random.below(model.segment_types, 1).expand_as(found["ids"]).contiguous()
        return {**found, "types": types}

    def ours(self, sample: Tensors, model: TrainingModel) -> Tensors:
        ids, types, mask = sample["ids"], sample["types"], sample["mask"]
        every_position = ids.new_ones(ids.shape).cumsum(dim=1) - 1
        outputs = model.run((ids, types, every_position, mask))
        logits, *next_sentence = outputs if isinstance(outputs, tuple) else (outputs,)
        found = {"logits": model.logits(logits)[mask.bool()]}
        return {**found, "pair": next_sentence[0]} if next_sentence else found

    def theirs(self, sample: Tensors, model: Any) -> Tensors:
        mask = sample["mask"]
        outputs = model(input_ids=sample["ids"], attention_mask=mask, token_type_ids=sample["types"])
        if "prediction_logits" not in outputs:
            return {"logits": outputs.logits[mask.bool()]}
        return {"logits": outputs.prediction_logits[mask.bool()], "pair": outputs.seq_relationship_logits}

    def config_token_ids(self, special: SpecialIds, end_of_text: int, decoder_start: int) -> dict[str, int | None]:
        return {"bos_token_id": special.start, "eos_token_id": special.separator, "pad_token_id": special.pad}


ADAPTER = BERTAdapter()
