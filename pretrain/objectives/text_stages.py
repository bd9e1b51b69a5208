"""The stages between a window of tokens and a batch, for the objectives in text_spec.py.

Each function takes (objective config, model config, open dataset, seed of the noise) and returns webdataset stages.
"""

from __future__ import annotations

from data_pipeline.corruption import FillInTheMiddle, PrefixCut, PrefixSplit, SpanCorruption
from data_pipeline.denoising import Denoising
from data_pipeline.index import TokenDataset
from data_pipeline.loader import each
from data_pipeline.manifest import TOKENIZER_FILE
from data_pipeline.masking import Masking, SegmentPairs
from data_pipeline.noise_facts import SpecialIds, num_masked, raw_tokens
from data_pipeline.pieces import sentence_ends, word_starts
from data_pipeline.tokenizer import Tokenizer
from pretrain.models import family_spec
from pretrain.models.family import FamilyConfig
from pretrain.objectives import OBJECTIVES
from pretrain.objectives import text_spec as spec
from pretrain.objectives.objective import ObjectiveConfig


def as_it_is(config: spec.CausalLMConfig, model: FamilyConfig, dataset: TokenDataset, seed: int | str) -> list:
    """Windows are batches already."""
    return []


def prefix_lm(config: spec.PrefixLMConfig, model: FamilyConfig, dataset: TokenDataset, seed: int | str) -> list:
    """A decoder sees the prefix in both directions; an encoder-decoder gets it as its source."""
    if family_spec(model.family).form == "decoder":
        return [each(PrefixCut(seed))]
    return [each(PrefixSplit(seed, _window_tokens(config, model), model.sequence_length, model.num_targets,
                             SpecialIds(model.vocab_size)))]


def fill_in_the_middle(config: spec.FillInTheMiddleConfig, model: FamilyConfig, dataset: TokenDataset,
                       seed: int | str) -> list:
    """The middle of documents moves to their end."""
    return [each(FillInTheMiddle(seed, config.rate, config.spm_rate, SpecialIds(model.vocab_size),
                                 dataset.manifest.end_of_text))]


def span_corruption(config: spec.SpanCorruptionConfig, model: FamilyConfig, dataset: TokenDataset,
                    seed: int | str) -> list:
    """Spans move from the source to the target."""
    counts = raw_tokens(model.sequence_length, config.noise_density, config.mean_span_length)
    return [each(SpanCorruption(seed, counts, model.num_targets, SpecialIds(model.vocab_size),
                                dataset.manifest.end_of_text))]


def denoising(config: spec.DenoisingConfig, model: FamilyConfig, dataset: TokenDataset, seed: int | str) -> list:
    """The source is damaged."""
    is_end = sentence_ends(_tokenizer(dataset)) if config.permute_sentences else None
    return [each(Denoising(seed, _window_tokens(config, model), model.sequence_length, model.num_targets,
                           SpecialIds(model.vocab_size), dataset.manifest.end_of_text, is_end, config.infill_ratio,
                           config.mean_span_length, config.mask_ratio, config.delete_ratio, config.rotate_rate))]


def masked_lm(config: spec.MaskedLMConfig, model: FamilyConfig, dataset: TokenDataset, seed: int | str) -> list:
    """Tokens are hidden; a model with a head for it judges pairs of segments as well."""
    window = _window_tokens(config, model)
    starts = word_starts(_tokenizer(dataset)) if config.whole_words else None
    order_seed = seed if isinstance(seed, int) else None  # held-out windows come in their stored order
    pairs = SegmentPairs(dataset, window, seed, order_seed) if model.next_sentence else None
    return [each(Masking(seed, window, num_masked(window, config.mask_ratio), SpecialIds(model.vocab_size),
                         dataset.manifest.vocab_size, config.masked_part, config.random_part, starts, pairs))]


def _window_tokens(config: ObjectiveConfig, model: FamilyConfig) -> int:
    return OBJECTIVES[config.name].window_tokens(config, model)


def _tokenizer(dataset: TokenDataset) -> Tokenizer:
    """The copy of the tokenizer in the dataset's folder."""
    return Tokenizer.load(dataset.folder / TOKENIZER_FILE)
