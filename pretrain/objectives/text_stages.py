"""The stages between a window of tokens and a batch, for the objectives in text_spec.py.

Each function takes (objective config, model config, open dataset, seed of the noise, special ids) and returns
webdataset stages. A dataset is a folder's or one in memory: what is asked of it is its tokenizer and, for pairs of
segments, its windows.
"""

from __future__ import annotations

from data_pipeline.corruption.bart_denoising import Denoising
from data_pipeline.corruption.masked_tokens import Masking, SegmentPairs
from data_pipeline.corruption.span_corruption import FillInTheMiddle, PrefixCut, PrefixSplit, SpanCorruption
from data_pipeline.corruption.special_ids import SpecialIds as Ids
from data_pipeline.corruption.special_ids import num_masked, raw_tokens
from data_pipeline.loader import each
from data_pipeline.text.token_pieces import sentence_ends, word_starts
from data_pipeline.tokens.in_memory_dataset import TextDataset
from data_pipeline.tokens.token_dataset import TokenDataset
from pretrain.models.family import FamilyConfig
from pretrain.objectives import OBJECTIVES
from pretrain.objectives import text_spec as spec
from pretrain.objectives.objective import ObjectiveConfig

Data = TokenDataset | TextDataset


def as_it_is(config: spec.CausalLMConfig, model: FamilyConfig, dataset: Data, seed: int | str, special: Ids) -> list:
    """Windows are batches already."""
    return []


def prefix_lm(config: spec.PrefixLMConfig, model: FamilyConfig, dataset: Data, seed: int | str, special: Ids) -> list:
    """A decoder sees the prefix in both directions; an encoder-decoder gets it as its source."""
    if getattr(model, "num_targets", None) is None:  # one sequence, and no side for targets
        return [each(PrefixCut(seed))]
    return [each(PrefixSplit(seed, _window_tokens(config, model), model.sequence_length, model.num_targets, special))]


def fill_in_the_middle(config: spec.FillInTheMiddleConfig, model: FamilyConfig, dataset: Data, seed: int | str,
                       special: Ids) -> list:
    """The middle of documents moves to their end."""
    return [each(FillInTheMiddle(seed, config.rate, config.spm_rate, special, dataset.end_of_text))]


def span_corruption(config: spec.SpanCorruptionConfig, model: FamilyConfig, dataset: Data, seed: int | str,
                    special: Ids) -> list:
    """Spans move from the source to the target."""
    counts = raw_tokens(model.sequence_length, config.noise_density, config.mean_span_length)
    return [each(SpanCorruption(seed, counts, model.num_targets, special, dataset.end_of_text))]


def denoising(config: spec.DenoisingConfig, model: FamilyConfig, dataset: Data, seed: int | str, special: Ids) -> list:
    """The source is damaged."""
    is_end = sentence_ends(dataset.tokenizer) if config.permute_sentences else None
    return [each(Denoising(seed, _window_tokens(config, model), model.sequence_length, model.num_targets, special,
                           dataset.end_of_text, is_end, config.infill_ratio, config.mean_span_length,
                           config.mask_ratio, config.delete_ratio, config.rotate_rate))]


def masked_lm(config: spec.MaskedLMConfig, model: FamilyConfig, dataset: Data, seed: int | str, special: Ids) -> list:
    """Tokens are hidden; a model with a head for it judges pairs of segments as well."""
    window = _window_tokens(config, model)
    starts = word_starts(dataset.tokenizer) if config.whole_words else None
    order_seed = seed if isinstance(seed, int) else None  # held-out windows come in their stored order
    pairs = SegmentPairs(dataset, window, seed, order_seed) if model.next_sentence else None
    return [each(Masking(seed, window, num_masked(window, config.mask_ratio), special, dataset.vocab_size,
                         config.masked_part, config.random_part, starts, pairs))]


def _window_tokens(config: ObjectiveConfig, model: FamilyConfig) -> int:
    return OBJECTIVES[config.name].window_tokens(config, model)

