"""Facts: the arithmetic of noised samples, known before any data is read. Imports neither torch nor numpy."""

from typing import NamedTuple

NUM_FIXED_IDS = 4  # pad, start, separator, mask


class SpecialIds(NamedTuple):
    """Token ids that no tokenizer gives out, counted down from the top of a model's vocabulary."""

    vocab_size: int

    @property
    def pad(self) -> int:
        """Fills up a sample; also T5's first decoder input."""
        return self.vocab_size - 1

    @property
    def start(self) -> int:
        """Begins a sequence: BERT's [CLS], BART's <s>."""
        return self.vocab_size - 2

    @property
    def separator(self) -> int:
        """Ends a segment: BERT's [SEP]."""
        return self.vocab_size - 3

    @property
    def mask(self) -> int:
        """Stands for a hidden token or span."""
        return self.vocab_size - 4

    @property
    def first_sentinel(self) -> int:
        """Sentinel number i is `first_sentinel - i`."""
        return self.vocab_size - 1 - NUM_FIXED_IDS


def num_special_ids(num_sentinels: int = 0) -> int:
    """Ids at the top of the vocabulary that a noise with so many sentinels takes."""
    return NUM_FIXED_IDS + num_sentinels


class GivenIds(NamedTuple):
    """The same ids where a model was trained elsewhere and has them in other places; None for what it never saw."""

    pad: int | None = None
    start: int | None = None
    separator: int | None = None
    mask: int | None = None
    first_sentinel: int | None = None


class SpanCounts(NamedTuple):
    """What span corruption does to a sample of `num_raw` tokens."""

    num_raw: int
    num_noise: int
    num_spans: int

    @property
    def num_inputs(self) -> int:
        """Kept tokens, a sentinel for each span, end-of-text."""
        return self.num_raw - self.num_noise + self.num_spans + 1

    @property
    def num_targets(self) -> int:
        """Hidden tokens, a sentinel before each span, end-of-text."""
        return self.num_noise + self.num_spans + 1


def span_counts(num_raw: int, density: float, mean_span: float) -> SpanCounts:
    """Hidden tokens and spans of a sample of at least 2 tokens (Raffel et al. 2020, section 3.1.4).

    Every span, hidden or kept, has at least one token.
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
