"""Special token ids, and the lengths of corrupted samples, known before any data is read.

Imports neither torch nor numpy, so that a config is checked on a login node.
"""

from __future__ import annotations

from typing import NamedTuple

NUM_FIXED_IDS = 4  # pad, start, separator, mask


class SpecialIds(NamedTuple):
    """Token ids that stand for no text. None: the model's tokenizer has no such token.

    Args:
        pad: pads a sample; also T5's first decoder input.
        start: begins a sequence: BERT's [CLS], BART's <s>.
        separator: ends a segment: BERT's [SEP].
        mask: replaces a masked token or span.
        first_sentinel: sentinel number i, which replaces the masked span i, is `first_sentinel - i`.
    """

    pad: int | None = None
    start: int | None = None
    separator: int | None = None
    mask: int | None = None
    first_sentinel: int | None = None

    def required(self, role: str) -> int:
        """The id of a field. Raises ValueError where the tokenizer has no such token."""
        found: int | None = getattr(self, role)
        if found is None:
            raise ValueError(f"the tokenizer has no token for {role}")
        return found

    @classmethod
    def at_top(cls, vocab_size: int) -> SpecialIds:
        """The ids of a model trained here, counted down from the top of its vocabulary."""
        return cls(*range(vocab_size - 1, vocab_size - 2 - NUM_FIXED_IDS, -1))


def num_special_ids(num_sentinels: int = 0) -> int:
    """Ids at the top of the vocabulary that an objective with `num_sentinels` sentinels needs."""
    return NUM_FIXED_IDS + num_sentinels


class SpanCounts(NamedTuple):
    """Lengths in span corruption: a sample of `num_raw` tokens with `num_noise` of them masked in `num_spans` spans."""

    num_raw: int
    num_noise: int
    num_spans: int

    @property
    def num_inputs(self) -> int:
        """Kept tokens, a sentinel for each span, end-of-text."""
        return self.num_raw - self.num_noise + self.num_spans + 1

    @property
    def num_targets(self) -> int:
        """Masked tokens, a sentinel before each span, end-of-text."""
        return self.num_noise + self.num_spans + 1


def span_counts(num_raw: int, density: float, mean_span: float) -> SpanCounts:
    """Masked tokens and spans of a sample of at least 2 tokens (Raffel et al. 2020, section 3.1.4).

    Every span, masked or kept, has at least one token.

    Args:
        num_raw: tokens of the sample.
        density: fraction of them to mask.
        mean_span: mean length of a masked span in tokens.
    """
    num_noise = min(max(round(num_raw * density), 1), num_raw - 1)
    num_spans = min(max(round(num_noise / mean_span), 1), num_noise, num_raw - num_noise)
    return SpanCounts(num_raw, num_noise, num_spans)


def raw_tokens(num_inputs: int, density: float, mean_span: float) -> SpanCounts | None:
    """The longest sample whose corrupted input has exactly `num_inputs` tokens; None when there is none."""
    found = None
    num_raw = max(2, num_inputs - 1)  # a sample grows by one token at most
    while (counts := span_counts(num_raw, density, mean_span)).num_inputs <= num_inputs:
        if counts.num_inputs == num_inputs:
            found = counts
        num_raw += 1
    return found


def num_masked(num_raw: int, ratio: float) -> int:
    """How many of `num_raw` tokens a masked language model predicts: at least one."""
    return min(max(round(num_raw * ratio), 1), num_raw)
