"""Corruption: its measured rates, the shape of spans, and that nothing is lost, over 10,000 random documents each."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.corruption.bart_denoising import Denoising, draw_spans, infill, permute_sentences
from data_pipeline.corruption.masked_tokens import Masking, choose_words
from data_pipeline.corruption.noise_seed import HELDOUT, NoiseSeed
from data_pipeline.corruption.random_stream import RandomStream
from data_pipeline.corruption.span_corruption import FillInTheMiddle, PrefixCut, PrefixSplit, SpanCorruption
from data_pipeline.corruption.special_ids import SpecialIds, num_special_ids, raw_tokens, span_counts

NUM_DOCUMENTS = 10_000
VOCAB_SIZE, END = 1_000, 1
SPECIAL = SpecialIds.at_top(VOCAB_SIZE + 200)


def documents(num_tokens, count=NUM_DOCUMENTS, seed=0):
    """Samples of `num_tokens` tokens and the next one; ids of a tokenizer, end-of-text included."""
    ids = np.random.default_rng(seed).integers(1, VOCAB_SIZE, size=(count, num_tokens + 1))
    return [{"position": position, "tokens": row} for position, row in enumerate(ids)]


def runs(flags):
    """Lengths of the runs of True in a row of flags."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(np.int8), [0]])))
    return edges[1::2] - edges[::2]


def restored(source, target):
    """The text that a source and a target of span corruption were made from."""
    target = target[: np.flatnonzero(target == END)[-1] + 1]
    is_sentinel = target > SPECIAL.first_sentinel - 150
    spans = {int(part[0]): part[1:] for part in np.split(target[:-1], np.flatnonzero(is_sentinel))[1:]}
    return np.concatenate([spans.get(int(token), [token]) for token in source[:-1]])


# -- span corruption ---------------------------------------------------------------------------------------------------


def test_lengths_are_those_of_the_paper():
    counts = raw_tokens(512, 0.15, 3.0)
    assert (counts.num_raw, counts.num_inputs, counts.num_targets) == (568, 512, 114)


@given(st.integers(3, 2048), st.sampled_from([0.1, 0.15, 0.3, 0.5]), st.sampled_from([2.0, 3.0, 8.0]))
@settings(deadline=None)
def test_inputs_fill_exactly(length, density, mean_span):
    counts = raw_tokens(length, density, mean_span)
    if counts is not None:
        assert counts.num_inputs == length
        assert counts.num_inputs + counts.num_targets == counts.num_raw + 2 * counts.num_spans + 2
    else:
        assert density == 0.5


@pytest.mark.slow
@pytest.mark.parametrize("length", [512, 128, 9])
def test_span_corruption(length):
    counts = raw_tokens(length, 0.15, 3.0)
    stage = SpanCorruption(NoiseSeed(7), counts, counts.num_targets + 3, SPECIAL, end_of_text=END)
    masked, firsts, spans = 0, [], []
    for sample in documents(counts.num_raw, NUM_DOCUMENTS if length == 128 else 500):
        out = stage(sample)
        source, target = out["source"], out["tokens"][1:]
        assert (source.size, out["tokens"][0], source[-1]) == (length, SPECIAL.pad, END)
        assert out["weights"].sum() == counts.num_targets
        assert (target[counts.num_targets :] == SPECIAL.pad).all()
        target = target[: counts.num_targets]
        assert np.array_equal(restored(source, target), sample["tokens"][: counts.num_raw])
        expected = SPECIAL.first_sentinel - np.arange(counts.num_spans)
        assert np.array_equal(source[source >= VOCAB_SIZE], expected)
        assert np.array_equal(target[target >= VOCAB_SIZE], expected)
        spans.append(runs(target[:-1] < VOCAB_SIZE))
        masked += spans[-1].sum()
        firsts.append(int(np.flatnonzero(source >= VOCAB_SIZE)[0]))
    num_samples = len(spans)
    spans = np.concatenate(spans)
    assert masked / num_samples / counts.num_raw == pytest.approx(0.15, abs=0.5 / counts.num_raw)
    assert spans.mean() == counts.num_noise / counts.num_spans
    assert spans.min() >= 1 and min(firsts) >= 1, "a kept token comes first"
    if length == 128:
        assert counts.num_noise / counts.num_spans == pytest.approx(3.0, abs=0.1)
        # A uniform cut of n items into k parts: P(part = 1) = (k - 1) / (n - 1).
        assert (spans == 1).mean() == pytest.approx((counts.num_spans - 1) / (counts.num_noise - 1), abs=0.01)


@pytest.mark.slow
@given(st.integers(2, 300), st.floats(0.01, 0.9), st.floats(1, 20), st.integers(0, 2**62))
@settings(deadline=None, max_examples=100)
def test_span_corruption_of_any_size_can_be_undone(num_raw, density, mean_span, seed):
    """10,000 documents: 100 of each size, density and mean length."""
    counts = span_counts(num_raw, density, mean_span)
    stage = SpanCorruption(NoiseSeed(seed), counts, counts.num_targets, SPECIAL, end_of_text=END)
    in_order = SPECIAL.first_sentinel - np.arange(counts.num_spans)
    for sample in documents(num_raw, 100, seed % 1000):
        out = stage(sample)
        source, target = out["source"], out["tokens"][1:]
        assert np.array_equal(source[source >= VOCAB_SIZE], in_order)
        assert np.array_equal(target[target >= VOCAB_SIZE], in_order)
        lengths = runs(target[:-1] < VOCAB_SIZE)
        assert (lengths.sum(), lengths.size, lengths.min() > 0) == (counts.num_noise, counts.num_spans, True)
        assert np.array_equal(restored(source, target), sample["tokens"][:num_raw])


# -- the same sample, the same corruption ------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [
    lambda seed: SpanCorruption(NoiseSeed(seed), span_counts(40, 0.15, 3.0), 12, SPECIAL, end_of_text=END),
    PrefixCut,
    lambda seed: FillInTheMiddle(NoiseSeed(seed), 1.0, 0.5, SPECIAL, end_of_text=END),
    lambda seed: Masking(NoiseSeed(seed), 40, 6, SPECIAL, vocab_size=VOCAB_SIZE, masked_part=0.8, random_part=0.1),
    lambda seed: denoising(40, seed=seed),
])  # fmt: skip
def test_corruption_depends_on_seed_and_position_alone(stage):
    def text(seed, position):
        out = stage(seed)({**documents(40, 1)[0], "position": position})
        return str({name: value.tolist() for name, value in out.items() if isinstance(value, np.ndarray)})

    assert text(NoiseSeed(7), 3) == text(NoiseSeed(7), 3)
    seeds = (NoiseSeed(7), NoiseSeed(8), HELDOUT)
    assert len({text(seed, position) for seed in seeds for position in range(5)}) >= 10


def test_uniform_numbers():
    random = RandomStream(NoiseSeed(1), 2, "test")
    assert random.uniform(10**5).mean() == pytest.approx(0.5, abs=0.01)
    assert np.bincount(random.below(10, 10**5)).min() > 9_000
    lengths = random.poisson(3.0, 10**5)
    assert (lengths.mean(), lengths.var()) == (pytest.approx(3.0, abs=0.05), pytest.approx(3.0, abs=0.1))
    assert (lengths == 0).mean() == pytest.approx(np.exp(-3), abs=0.005)


# -- prefix and middle -------------------------------------------------------------------------------------------------


def test_prefixes_are_uniform_and_nothing_is_lost():
    prefixes = []
    for sample in documents(16, 2_000):
        cut = PrefixCut(NoiseSeed(3))(sample)
        prefix = int(cut["prefix"])
        assert np.array_equal(cut["tokens"], sample["tokens"])
        assert cut["weights"].tolist() == [float(target >= prefix) for target in range(1, 17)]
        split = PrefixSplit(NoiseSeed(3), 16, 16, 16, special=SPECIAL)(sample)
        num_source, num_target = split["source_mask"].sum(), int(split["weights"].sum())
        both = np.concatenate([split["source"][:num_source], split["tokens"][1 : num_target + 1]])
        assert np.array_equal(both, sample["tokens"][:16])
        assert num_source == prefix
        prefixes.append(prefix)
    assert (min(prefixes), max(prefixes)) == (1, 15)
    assert np.mean(prefixes) == pytest.approx(8, abs=0.3)


@pytest.mark.slow
def test_fill_in_the_middle_can_be_undone():
    pre, suf, mid = (SPECIAL.first_sentinel - number for number in range(3))
    kinds = {"as it was": 0, "prefix first": 0, "suffix first": 0}
    for number in range(NUM_DOCUMENTS):
        text = documents(30, 1, seed=number)[0]["tokens"]
        text[text == END] = 2
        room = np.full(4, END)  # empty documents, so that nothing is cut off
        row = FillInTheMiddle(NoiseSeed(5), 0.5, 0.4, SPECIAL, end_of_text=END)(
            {"position": number, "tokens": np.concatenate([text, [END], room])})["tokens"]
        if pre not in row:
            kinds["as it was"] += 1
            assert np.array_equal(row[:31], text)
            continue
        row = row[: np.flatnonzero(row == END)[0]]
        first, second, third = (int(np.flatnonzero(row == token)[0]) for token in (pre, suf, mid))
        if second == first + 1:
            kinds["suffix first"] += 1
            back = np.concatenate([row[third + 1 :], row[second + 1 : third]])
        else:
            kinds["prefix first"] += 1
            back = np.concatenate([row[first + 1 : second], row[third + 1 :], row[second + 1 : third]])
        assert np.array_equal(back, text)
    assert kinds["as it was"] / NUM_DOCUMENTS == pytest.approx(0.5, abs=0.02)
    assert kinds["suffix first"] / NUM_DOCUMENTS == pytest.approx(0.2, abs=0.02)


# -- BART --------------------------------------------------------------------------------------------------------------


def denoising(num_raw, seed=None, **options):
    plain = {"is_end": None, "infill_ratio": 0.3, "mean_span": 3.0, "mask_ratio": 0.0, "delete_ratio": 0.0,
             "rotate_rate": 0.0}
    return Denoising(seed or NoiseSeed(7), num_raw, num_raw + 2, num_raw + 2, special=SPECIAL, end_of_text=END,
                     **{**plain, **options})


@pytest.mark.slow
def test_infilling():
    num_tokens, num_masked = 126, round(126 * 0.3)
    lengths = []
    for sample in documents(num_tokens):
        tokens = sample["tokens"][:num_tokens]
        spans = draw_spans(RandomStream(NoiseSeed(7), sample["position"], "infill"), num_tokens, num_masked, 3.0)
        corrupted = infill(tokens, spans, SPECIAL.mask)
        assert spans.lengths.sum() == num_masked, "the density is exact"
        assert (corrupted == SPECIAL.mask).sum() == spans.lengths.size
        is_mask = corrupted == SPECIAL.mask
        assert not (is_mask[:-1] & is_mask[1:]).any(), "a kept token between spans"
        assert np.array_equal(unfilled(corrupted, tokens, spans), tokens)
        lengths.append(spans.lengths)
    lengths = np.concatenate(lengths)
    # All spans but the last of a sample are Poisson(3); the last is cut so that the sum is exact.
    assert lengths.mean() == pytest.approx(3.0, abs=0.3)
    assert (lengths == 0).mean() == pytest.approx(np.exp(-3), abs=0.01)
    assert lengths.var() == pytest.approx(3.0, abs=0.3)


@pytest.mark.slow
@given(st.integers(2, 60), st.floats(0, 0.95), st.floats(1, 12), st.integers(0, 10**9))
@settings(deadline=None, max_examples=100)
def test_infilling_of_any_size_can_be_undone(num_tokens, ratio, mean_span, seed):
    """10,000 documents: 100 of each size, ratio and mean length."""
    num_masked = round(num_tokens * ratio)
    for sample in documents(num_tokens, 100, seed % 1000):
        tokens = sample["tokens"][:num_tokens]
        random = RandomStream(NoiseSeed(seed), sample["position"], "infill")
        spans = draw_spans(random, num_tokens, num_masked, mean_span)
        corrupted = infill(tokens, spans, SPECIAL.mask)
        assert spans.lengths.sum() == num_masked
        assert (corrupted != SPECIAL.mask).sum() == num_tokens - num_masked
        assert corrupted.size <= num_tokens
        assert np.array_equal(unfilled(corrupted, tokens, spans), tokens)


def unfilled(corrupted, tokens, spans):
    """The text that was infilled: every mask is replaced by its span."""
    spans = iter(zip(spans.starts, spans.lengths, strict=True))
    parts = []
    for token in corrupted:
        start, length = next(spans) if token == SPECIAL.mask else (0, 0)
        parts.append(tokens[start : start + length] if token == SPECIAL.mask else [token])
    assert next(spans, None) is None
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def test_sentences_are_shuffled_whole():
    is_end = np.zeros(VOCAB_SIZE + 200, dtype=bool)
    is_end[:100] = True
    first_places = []
    for sample in documents(50, 2_000):
        tokens = sample["tokens"]
        shuffled = permute_sentences(RandomStream(NoiseSeed(7), sample["position"], "sentences"), tokens, is_end)
        cut = np.flatnonzero(is_end[tokens[:-1]]) + 1
        before = [part.tolist() for part in np.split(tokens, cut)]
        assert sorted(shuffled.tolist()) == sorted(tokens.tolist())
        text = "," + ",".join(map(str, shuffled)) + ","
        assert all("," + ",".join(map(str, part)) + "," in text for part in before)
        if len(before) == 5:
            first_places.append(np.array_equal(shuffled[: len(before[0])], before[0]))
    assert np.mean(first_places) == pytest.approx(0.2, abs=0.08)


def test_kinds_of_corruption_and_the_original_target():
    kept = {"mask": [], "delete": []}
    for sample in documents(100, 300):
        tokens = sample["tokens"][:100]
        masked = denoising(100, infill_ratio=0.0, mask_ratio=0.2)(sample)
        deleted = denoising(100, infill_ratio=0.0, delete_ratio=0.2)(sample)
        rotated = denoising(100, infill_ratio=0.0, rotate_rate=1.0)(sample)
        kept["mask"].append((masked["source"] == SPECIAL.mask).sum())
        kept["delete"].append(deleted["source_mask"].sum())
        where = int(np.flatnonzero(rotated["source"][1:101] == tokens[0])[0])
        assert sorted(rotated["source"][1:101]) == sorted(tokens) and where >= 0
        for out in (masked, deleted, rotated):
            assert out["tokens"].tolist() == [END, SPECIAL.start, *tokens, END]
            assert (out["source"][0], out["source"][out["source_mask"].sum() - 1]) == (SPECIAL.start, END)
            assert (out["source"][out["source_mask"] == 0] == SPECIAL.pad).all()
    assert set(kept["mask"]) == {20} and set(kept["delete"]) == {82}


# -- BERT --------------------------------------------------------------------------------------------------------------


def test_masking():
    stage = Masking(NoiseSeed(7), 126, 19, SPECIAL, vocab_size=VOCAB_SIZE, masked_part=0.8, random_part=0.1)
    parts, places = [], np.zeros(126)
    for sample in documents(126, 4_000):
        tokens = sample["tokens"][:126]
        out = stage(sample)
        framed = np.concatenate([[SPECIAL.start], tokens, [SPECIAL.separator]])
        assert out["weights"].sum() == 19 and len(set(out["positions"])) == 19
        assert np.array_equal(framed[out["positions"]], out["labels"])
        back = out["tokens"].copy()
        back[out["positions"]] = out["labels"]
        assert np.array_equal(back, framed)
        shown = out["tokens"][out["positions"]]
        parts.append([(shown == SPECIAL.mask).mean(), (shown == out["labels"]).mean()])
        places[out["positions"] - 1] += 1
    assert np.mean(parts, axis=0) == pytest.approx([0.8, 0.1], abs=0.01)
    assert places / 4_000 == pytest.approx(np.full(126, 19 / 126), abs=0.03)


def test_whole_words():
    chance = np.random.default_rng(0)
    sizes = []
    for number in range(2_000):
        starts = chance.random(60) < 0.4
        starts[0] = True
        chosen = choose_words(RandomStream(NoiseSeed(3), number, "mask"), starts, 9)
        word = np.cumsum(starts)
        assert all(len(set(chosen[word == each])) == 1 for each in np.unique(word)) or chosen.sum() == 9
        assert 1 <= chosen.sum() <= 9
        sizes.append(chosen.sum())
    assert np.mean(sizes) > 7


def test_a_word_longer_than_the_tokens_to_mask():
    starts = np.zeros(20, dtype=bool)
    starts[0] = True
    assert choose_words(RandomStream(NoiseSeed(3), 0, "mask"), starts, 3).tolist() == [True] * 3 + [False] * 17


def test_special_ids_do_not_meet():
    ids = [SPECIAL.pad, SPECIAL.start, SPECIAL.separator, SPECIAL.mask, SPECIAL.first_sentinel]
    assert sorted(ids) == list(range(VOCAB_SIZE + 200 - num_special_ids(1), VOCAB_SIZE + 200))
