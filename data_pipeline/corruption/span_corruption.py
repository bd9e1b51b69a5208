"""Stages that turn a window of tokens into a source and a target: span corruption, prefix LM, fill-in-the-middle.

Shapes: n tokens of the window, s of the source, t of the target. Each stage takes a sample with `position` and `tokens`
(int64 [n + 1]; the last token is the target of the one before, and is left out unless the docstring says otherwise).
Token fields are int64, `weights` float32. `seed` is that of a RandomStream.
"""

from dataclasses import KW_ONLY, dataclass

import numpy as np

from data_pipeline.corruption.noise_seed import NoiseSeed
from data_pipeline.corruption.random_stream import RandomStream
from data_pipeline.corruption.special_ids import SpanCounts, SpecialIds


def span_mask(random: RandomStream, counts: SpanCounts) -> np.ndarray:
    """bool [n], True where masked: kept and masked spans in turn, a kept one first (as in T5's published code)."""
    masked = random.segments(counts.num_noise, counts.num_spans)
    kept = random.segments(counts.num_raw - counts.num_noise, counts.num_spans)
    lengths = np.stack([kept, masked], axis=1).reshape(-1)
    return np.repeat(np.arange(lengths.size) % 2 == 1, lengths)


def spans_to_sentinels(tokens: np.ndarray, masked: np.ndarray, first_sentinel: int) -> np.ndarray:
    """`tokens` with one sentinel in place of each run of masked tokens, counted down from `first_sentinel`."""
    begins = masked & ~np.concatenate([[False], masked[:-1]])
    with_sentinels = np.where(begins, first_sentinel + 1 - np.cumsum(begins), tokens)
    return with_sentinels[begins | ~masked]


def shifted(start: int, tokens: np.ndarray, length: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Decoder tokens int64 [length + 1], shifted right behind `start` and padded, and weights float32 [length].

    The inputs are row[:-1], the targets row[1:]; the weight of a padded target is 0.
    """
    row = np.full(length + 1, pad, dtype=np.int64)
    row[0] = start
    row[1 : tokens.size + 1] = tokens
    return row, (np.arange(length) < tokens.size).astype(np.float32)


def padded(tokens: np.ndarray, length: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """`tokens` padded to int64 [length], and a mask int64 [length] that is 1 for tokens and 0 for padding."""
    row = np.full(length, pad, dtype=np.int64)
    row[: tokens.size] = tokens
    return row, (np.arange(length) < tokens.size).astype(np.int64)


@dataclass(frozen=True)
class SourceTarget:
    """What stages have in common whose source and target are padded to the lengths of the two sides of a model.

    Args:
        seed: of the random stream.
        num_raw: tokens of a sample.
        source_length, target_length: s and t.
        special: ids of the special tokens that the stage uses, and of padding.
    """

    seed: NoiseSeed
    num_raw: int
    source_length: int
    target_length: int
    _: KW_ONLY
    special: SpecialIds

    def fields(self, position: int, source: np.ndarray, target: np.ndarray, decoder_start: int) -> dict:
        """Fields `source` and `source_mask` [s], `tokens` [t + 1] behind `decoder_start`, `weights` [t]."""
        pad = self.special.required("pad")
        row, weights = shifted(decoder_start, target, self.target_length, pad)
        source, mask = padded(source, self.source_length, pad)
        return {"position": position, "source": source, "source_mask": mask, "tokens": row, "weights": weights}


@dataclass(frozen=True)
class SpanCorruption:
    """T5's objective: masked spans move from the source to the target (Raffel et al. 2020, section 3.1.4).

    The source holds the kept tokens and a sentinel for each span, the target each sentinel and the tokens of its span.

    Args:
        seed: of the random stream.
        counts: lengths; a sample has exactly `counts.num_raw` tokens and a source exactly s = `counts.num_inputs`.
        target_length: t.
        special: ids of the sentinels and of padding.
        end_of_text: ends source and target.
    """

    seed: NoiseSeed
    counts: SpanCounts
    target_length: int
    special: SpecialIds
    _: KW_ONLY
    end_of_text: int

    def __call__(self, sample: dict) -> dict:
        """Fields `source` [s], `tokens` [t + 1], `weights` [t]."""
        tokens = sample["tokens"][: self.counts.num_raw]
        masked = span_mask(RandomStream(self.seed, sample["position"], "spans"), self.counts)
        end, pad, sentinel = [self.end_of_text], self.special.required("pad"), self.special.required("first_sentinel")
        source = np.concatenate([spans_to_sentinels(tokens, masked, sentinel), end])
        target = np.concatenate([spans_to_sentinels(tokens, ~masked, sentinel), end])
        row, weights = shifted(pad, target, self.target_length, pad)
        return {"position": sample["position"], "source": source, "tokens": row, "weights": weights}


@dataclass(frozen=True)
class PrefixCut:
    """Prefix LM of a decoder: attention is bidirectional over a random prefix, whose tokens are no targets.

    Args:
        seed: of the random stream.
    """

    seed: NoiseSeed

    def __call__(self, sample: dict) -> dict:
        """Fields `tokens` [n + 1], unchanged; `prefix` int64 [] in 1 .. n - 1; `weights` [n]."""
        length = sample["tokens"].size - 1
        prefix = 1 + RandomStream(self.seed, sample["position"], "prefix").below(length - 1, 1)[0]
        # The prefix's last token predicts the first one after it.
        weights = (np.arange(length) >= prefix - 1).astype(np.float32)
        return {**sample, "prefix": np.asarray(prefix), "weights": weights}


@dataclass(frozen=True)
class PrefixSplit(SourceTarget):
    """Prefix LM of an encoder-decoder: a random prefix is the source, the rest the target.

    Both lengths are at least `num_raw` - 1.
    """

    def __call__(self, sample: dict) -> dict:
        """Fields `source` and `source_mask` [s], `tokens` [t + 1], `weights` [t]."""
        tokens = sample["tokens"][: self.num_raw]
        random = RandomStream(self.seed, sample["position"], "prefix")
        prefix = 1 + int(random.below(self.num_raw - 1, 1)[0])
        return self.fields(sample["position"], tokens[:prefix], tokens[prefix:], self.special.required("pad"))


@dataclass(frozen=True)
class FillInTheMiddle:
    """Moves the middle of documents to their end (Bavarian et al. 2022, section 3 and appendix D).

    The stage sees one window, so the part of a document that lies in it counts as a document. Sentinels 0, 1, 2 stand
    before prefix, suffix and middle. In the paper's joint SPM form, prefix and middle follow each other: <pre> <suf>
    suffix <mid> prefix middle. Tokens that no longer fit into the window are cut from its end.

    Args:
        seed: of the random stream.
        rate: fraction of the documents that are rearranged.
        spm_rate: fraction of those in SPM form; the others are <pre> prefix <suf> suffix <mid> middle.
        special: ids of the sentinels.
        end_of_text: ends every document.
    """

    seed: NoiseSeed
    rate: float
    spm_rate: float
    special: SpecialIds
    _: KW_ONLY
    end_of_text: int

    def __call__(self, sample: dict) -> dict:
        """Field `tokens` [n + 1], the last one included."""
        tokens, random = sample["tokens"], RandomStream(self.seed, sample["position"], "middle")
        documents = np.split(tokens, np.flatnonzero(tokens == self.end_of_text) + 1)
        chances = random.uniform(4 * len(documents)).reshape(-1, 4)
        parts = [self._rearranged(document, row) for document, row in zip(documents, chances, strict=True)]
        return {**sample, "tokens": np.concatenate(parts)[: tokens.size]}

    def _rearranged(self, document: np.ndarray, chances: np.ndarray) -> np.ndarray:
        ends = document.size > 0 and document[-1] == self.end_of_text
        text = document[:-1] if ends else document
        if text.size < 3 or chances[0] >= self.rate:
            return document
        first, second = np.sort((chances[2:] * (text.size + 1)).astype(np.int64))
        prefix, middle, suffix = text[:first], text[first:second], text[second:]
        pre, suf, mid = ([self.special.required("first_sentinel") - number] for number in range(3))
        if chances[1] < self.spm_rate:
            parts = [pre, suf, suffix, mid, prefix, middle]
        else:
            parts = [pre, prefix, suf, suffix, mid, middle]
        return np.concatenate([*parts, document[text.size :]]).astype(np.int64)
