"""The stages between a window of tokens and a batch, for the objectives in text_spec.py."""

from __future__ import annotations

from data_pipeline.corruption.bart_denoising import Denoising
from data_pipeline.corruption.gap_sentences import GapSentences
from data_pipeline.corruption.masked_tokens import Masking, SegmentPairs
from data_pipeline.corruption.span_corruption import FillInTheMiddle, PrefixCut, PrefixSplit, SpanCorruption
from data_pipeline.corruption.special_ids import num_masked, raw_tokens
from data_pipeline.loader import each
from data_pipeline.text.token_pieces import sentence_ends, word_starts
from pretrain.models.family import EncoderModel, SequenceModel, TargetModel
from pretrain.objectives.objective import ObjectiveConfig, StageInputs
from pretrain.objectives.text_spec import (
    DenoisingConfig,
    FillInTheMiddleConfig,
    GapSentencesConfig,
    MaskedLMConfig,
    SpanCorruptionConfig,
)


def unchanged(given: StageInputs[ObjectiveConfig, SequenceModel]) -> list:
    """Windows are batches already."""
    return []


def prefix_lm(given: StageInputs[ObjectiveConfig, SequenceModel]) -> list:
    """A decoder sees the prefix in both directions; an encoder-decoder gets it as its source."""
    model = given.model
    num_targets = getattr(model, "num_targets", None)
    if num_targets is None:  # one sequence, and no side for targets
        return [each(PrefixCut(given.seed))]
    return [each(PrefixSplit(given.seed, given.window_tokens, model.sequence_length, num_targets,
                             special=given.special))]


def fill_in_the_middle(given: StageInputs[FillInTheMiddleConfig, SequenceModel]) -> list:
    """The middle of documents moves to their end."""
    return [each(FillInTheMiddle(given.seed, given.config.rate, given.config.spm_rate, given.special,
                                 end_of_text=given.dataset.end_of_text))]


def span_corruption(given: StageInputs[SpanCorruptionConfig, TargetModel]) -> list:
    """Spans move from the source to the target."""
    config, model = given.config, given.model
    counts = raw_tokens(model.sequence_length, config.noise_density, config.mean_span_length)
    if counts is None:
        raise ValueError(f"no sample of span corruption has a source of {model.sequence_length} tokens")
    return [each(SpanCorruption(given.seed, counts, model.num_targets, given.special,
                                end_of_text=given.dataset.end_of_text))]


def denoising(given: StageInputs[DenoisingConfig, TargetModel]) -> list:
    """The source is corrupted, the target is the whole text."""
    config, model, dataset = given.config, given.model, given.dataset
    is_end = sentence_ends(dataset.tokenizer) if config.permute_sentences else None
    return [each(Denoising(given.seed, given.window_tokens, model.sequence_length, model.num_targets,
                           special=given.special, end_of_text=dataset.end_of_text, is_end=is_end,
                           infill_ratio=config.infill_ratio, mean_span=config.mean_span_length,
                           mask_ratio=config.mask_ratio, delete_ratio=config.delete_ratio,
                           rotate_rate=config.rotate_rate))]


def gap_sentences(given: StageInputs[GapSentencesConfig, TargetModel]) -> list:
    """Whole sentences move from the source to the target."""
    config, model, dataset = given.config, given.model, given.dataset
    return [each(GapSentences(given.seed, given.window_tokens, model.sequence_length, model.num_targets,
                              special=given.special, end_of_text=dataset.end_of_text,
                              is_end=sentence_ends(dataset.tokenizer), gap_ratio=config.gap_ratio,
                              choice=config.choice))]


def masked_lm(given: StageInputs[MaskedLMConfig, EncoderModel]) -> list:
    """Tokens are masked; a model with a head for next-sentence prediction gets pairs of segments."""
    config, dataset, window, seed = given.config, given.dataset, given.window_tokens, given.seed
    starts = word_starts(dataset.tokenizer) if config.whole_words else None
    pairs = SegmentPairs(dataset, window, seed) if given.model.next_sentence else None
    return [each(Masking(seed, window, num_masked(window, config.mask_ratio), given.special,
                         vocab_size=dataset.vocab_size, masked_part=config.masked_part,
                         random_part=config.random_part, starts=starts, pairs=pairs))]
