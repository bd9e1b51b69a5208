"""The objectives on text: fields, length of a sample, special tokens, what does not fit (no torch)."""

from collections.abc import Callable, Iterator
from itertools import count
from typing import Any, Literal

from pydantic import Field

from common.errors import Problem
from data_pipeline.corruption.special_ids import num_masked, num_special_ids, raw_tokens
from pretrain.models.family import SequenceModel, TargetModel
from pretrain.objectives.objective import END_OF_TEXT_ROLE, ObjectiveConfig, ObjectiveSpec, SpecialTokens

STAGES = "pretrain.objectives.text_stages"
CAUSAL = "pretrain.objectives.causal_lm:CausalLM"
SEQ2SEQ = "pretrain.objectives.seq2seq:Seq2Seq"
MASKED = "pretrain.objectives.masked_lm:MaskedLM"


class CausalLMConfig(ObjectiveConfig):
    """Predicts every next token (Radford et al. 2018)."""

    name: Literal["causal_lm"] = Field("causal_lm", description="the objective")


class PrefixLMConfig(ObjectiveConfig):
    """Attends to a random prefix in both directions and predicts the rest (Raffel et al. 2020, section 3.2.1)."""

    name: Literal["prefix_lm"] = Field("prefix_lm", description="the objective")


class FillInTheMiddleConfig(ObjectiveConfig):
    """Predicts every next token, with the middle of some documents moved to their end (Bavarian et al. 2022)."""

    name: Literal["fill_in_the_middle"] = Field("fill_in_the_middle", description="the objective")
    rate: float = Field(0.5, ge=0, le=1, description="fraction of the documents that are rearranged")
    spm_rate: float = Field(
        0.5, ge=0, le=1,
        description="fraction of those in the order suffix, prefix, middle; others: prefix, suffix, middle"
    )


class SpanCorruptionConfig(ObjectiveConfig):
    """Predicts random spans, each replaced by one sentinel (Raffel et al. 2020, section 3.1.4)."""

    name: Literal["span_corruption"] = Field("span_corruption", description="the objective")
    noise_density: float = Field(0.15, gt=0, le=0.9, description="fraction of the tokens that are masked")
    mean_span_length: float = Field(3.0, ge=1, description="mean number of tokens in a masked span")


class DenoisingConfig(ObjectiveConfig):
    """Restores a corrupted sample (Lewis et al. 2020). Kinds of corruption are applied in the order of their fields."""

    name: Literal["denoising"] = Field("denoising", description="the objective")
    permute_sentences: bool = Field(True, description="shuffle sentences; lines and end-of-text end one as well")
    infill_ratio: float = Field(0.3, ge=0, lt=1, description="fraction of the tokens in spans that become a mask each")
    mean_span_length: float = Field(3.0, ge=1, description="mean of the Poisson distribution of span lengths")
    mask_ratio: float = Field(0.0, ge=0, lt=1, description="fraction of the tokens replaced by a mask each")
    delete_ratio: float = Field(0.0, ge=0, lt=1, description="fraction of the tokens deleted")
    rotate_rate: float = Field(0.0, ge=0, le=1, description="fraction of the samples rotated to a random first token")


class GapSentencesConfig(ObjectiveConfig):
    """Generates whole sentences that are masked in the source (Zhang et al. 2020, PEGASUS, section 3.1)."""

    name: Literal["gap_sentences"] = Field("gap_sentences", description="the objective")
    gap_ratio: float = Field(0.3, gt=0, le=0.9, description="fraction of the sentences that are masked, at least one")
    choice: Literal["principal", "random"] = Field(
        "principal", description="the sentences with the highest ROUGE-1 F1 against the rest, or random ones"
    )


class MaskedLMConfig(ObjectiveConfig):
    """Predicts masked tokens from both sides, masked anew in every epoch (Devlin et al. 2019, Liu et al. 2019)."""

    name: Literal["masked_lm"] = Field("masked_lm", description="the objective")
    mask_ratio: float = Field(0.15, gt=0, le=0.9, description="fraction of the tokens that are predicted")
    masked_part: float = Field(0.8, ge=0, le=1, description="fraction of the predicted tokens that become a mask")
    random_part: float = Field(
        0.1, ge=0, le=1, description="fraction of the predicted tokens that become a random token; the others stay"
    )
    whole_words: bool = Field(False, description="mask all pieces of a word or none")


Problems = Callable[[ObjectiveConfig, SequenceModel], Iterator[Problem]]


def _at_least(num_tokens: int, why: str) -> Problems:
    def problems(config: ObjectiveConfig, model: SequenceModel) -> Iterator[Problem]:
        if model.sequence_length < num_tokens:
            yield Problem("model.sequence_length", f"{model.sequence_length} tokens for {config.name}",
                          f"at least {num_tokens}: {why}", f"set model.sequence_length={num_tokens} or more")

    return problems


def _span_problems(config: SpanCorruptionConfig, model: TargetModel) -> Iterator[Problem]:
    counts = raw_tokens(model.sequence_length, config.noise_density, config.mean_span_length)
    if counts is None:
        best = next(n for n in count(max(3, model.sequence_length))
                    if raw_tokens(n, config.noise_density, config.mean_span_length))
        yield Problem("model.sequence_length", f"inputs of {model.sequence_length} tokens by span_corruption",
                      f"no sample fills exactly that at noise_density={config.noise_density} and "
                      f"mean_span_length={config.mean_span_length}: a kept token, a sentinel and end-of-text are the "
                      "least",
                      f"set model.sequence_length={best}")
    elif counts.num_targets > model.num_targets:
        yield Problem("model.target_length", f"{model.num_targets} tokens for the hidden spans",
                      f"{counts.num_targets}: {counts.num_noise} hidden tokens, {counts.num_spans} sentinels and "
                      f"end-of-text of {counts.num_raw} tokens",
                      f"set model.target_length={counts.num_targets} or more")


def _denoising_problems(config: DenoisingConfig, model: TargetModel) -> Iterator[Problem]:
    yield from _at_least(4, "two tokens of text between the first and the last")(config, model)
    if model.num_targets < model.sequence_length:
        yield Problem("model.target_length", f"{model.num_targets} tokens to restore {model.sequence_length}",
                      f"at least {model.sequence_length}, the length of the sample", "leave model.target_length out")


def _masked_problems(config: MaskedLMConfig, model: SequenceModel) -> Iterator[Problem]:
    yield from _at_least(5, "three special tokens and one token of text on either side")(config, model)
    if config.masked_part + config.random_part > 1:
        yield Problem("objective.masked_part", f"masked_part={config.masked_part} and random_part={config.random_part}",
                      "a sum of at most 1", f"set objective.random_part={round(1 - config.masked_part, 6)} or less")


def _prefix_tokens(config: ObjectiveConfig, model: SequenceModel) -> int:
    """A decoder takes the sample as it is; an encoder-decoder splits it, and either part must fit its side."""
    targets = getattr(model, "num_targets", None)
    return model.sequence_length if targets is None else min(model.sequence_length, targets)


def _span_raw(config: SpanCorruptionConfig, model: SequenceModel) -> int:
    counts = raw_tokens(model.sequence_length, config.noise_density, config.mean_span_length)
    return counts.num_raw if counts else model.sequence_length


def _span_ids(config: SpanCorruptionConfig, model: SequenceModel) -> int:
    counts = raw_tokens(model.sequence_length, config.noise_density, config.mean_span_length)
    return num_special_ids(counts.num_spans if counts else 0)


def _special_ids(config: ObjectiveConfig, model: SequenceModel) -> int:
    return num_special_ids()


SPECS: dict[str, ObjectiveSpec[Any, Any]] = {
    "causal_lm": ObjectiveSpec(CausalLMConfig, {"decoder": CAUSAL}, f"{STAGES}:unchanged"),
    "prefix_lm": ObjectiveSpec(
        PrefixLMConfig, {"decoder": CAUSAL, "encoder_decoder": SEQ2SEQ}, f"{STAGES}:prefix_lm",
        window_tokens=_prefix_tokens, reserved_ids=_special_ids,
        problems=_at_least(2, "one token before the cut and one after"), special=SpecialTokens(named=("pad",))),
    "fill_in_the_middle": ObjectiveSpec(
        FillInTheMiddleConfig, {"decoder": CAUSAL}, f"{STAGES}:fill_in_the_middle",
        reserved_ids=lambda config, model: num_special_ids(num_sentinels=3),
        problems=_at_least(6, "three sentinels and a token of each part"),
        special=SpecialTokens(sentinel_names=("<fim_prefix>", "<fim_suffix>", "<fim_middle>"))),
    "span_corruption": ObjectiveSpec(
        SpanCorruptionConfig, {"encoder_decoder": SEQ2SEQ}, f"{STAGES}:span_corruption",
        window_tokens=_span_raw, reserved_ids=_span_ids, problems=_span_problems,
        special=SpecialTokens(needed=("pad",), after=(END_OF_TEXT_ROLE,))),
    "denoising": ObjectiveSpec(
        DenoisingConfig, {"encoder_decoder": SEQ2SEQ}, f"{STAGES}:denoising",
        window_tokens=lambda config, model: model.sequence_length - 2, reserved_ids=_special_ids,
        problems=_denoising_problems, special=SpecialTokens(
            needed=("pad", "start", "mask"), before=("start",), after=(END_OF_TEXT_ROLE,),
            decoder_start=END_OF_TEXT_ROLE)),
    "gap_sentences": ObjectiveSpec(
        GapSentencesConfig, {"encoder_decoder": SEQ2SEQ}, f"{STAGES}:gap_sentences",
        window_tokens=lambda config, model: model.sequence_length - 1, reserved_ids=_special_ids,
        problems=_at_least(3, "two tokens of text and end-of-text"),
        special=SpecialTokens(needed=("pad", "mask"), after=(END_OF_TEXT_ROLE,))),
    "masked_lm": ObjectiveSpec(
        MaskedLMConfig, {"encoder": MASKED}, f"{STAGES}:masked_lm",
        window_tokens=lambda config, model: model.sequence_length - model.num_frame_tokens,
        reserved_ids=_special_ids, problems=_masked_problems,
        num_predictions=lambda config, model: num_masked(model.sequence_length - model.num_frame_tokens,
                                                         config.mask_ratio),
        special=SpecialTokens(
            needed=("start", "separator", "mask"), named=("pad",), before=("start",), after=("separator",))),
}
