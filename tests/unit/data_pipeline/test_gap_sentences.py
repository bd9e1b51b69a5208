"""Gap sentences: the right ones are chosen, and source and target together are the window."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.corruption.gap_sentences import GapSentences, rouge1_f1
from data_pipeline.corruption.noise_seed import NoiseSeed
from data_pipeline.corruption.special_ids import SpecialIds

STOP, END, VOCAB_SIZE = 9, 10, 40
SPECIAL = SpecialIds.at_top(VOCAB_SIZE)
IS_END = np.isin(np.arange(VOCAB_SIZE), (STOP, END))


def stage(num_raw: int = 60, target_length: int = 61, gap_ratio: float = 0.3, *, choice: str = "principal"
          ) -> GapSentences:
    return GapSentences(NoiseSeed(7), num_raw, num_raw + 1, target_length, special=SPECIAL, end_of_text=END,
                        is_end=IS_END, gap_ratio=gap_ratio, choice=choice)


def window(seed: int, num_raw: int = 60, words: int = STOP) -> dict:
    tokens = np.random.default_rng(seed).integers(0, words + 1, num_raw + 1)
    return {"position": seed, "tokens": tokens}


def defined(sentence: list[int], others: list[int]) -> float:
    overlap = sum((Counter(sentence) & Counter(others)).values())
    return 2 * overlap / (len(sentence) + len(others))


@given(st.lists(st.lists(st.integers(0, 8), min_size=1, max_size=8), min_size=2, max_size=8))
def test_rouge_is_that_of_its_definition(sentences):
    expected = [defined(sentence, [word for other in sentences[:number] + sentences[number + 1 :] for word in other])
                for number, sentence in enumerate(sentences)]
    assert rouge1_f1([np.array(sentence) for sentence in sentences]) == pytest.approx(expected)


@pytest.mark.parametrize("choice", ["principal", "random"])
@given(st.integers(0, 10**6), st.integers(3, 80), st.floats(0.01, 0.9))
@settings(max_examples=100, deadline=None)
def test_source_and_target_are_the_window(choice, seed, num_raw, gap_ratio):
    made = stage(num_raw, num_raw + 1, gap_ratio, choice=choice)
    sample = window(seed, num_raw)
    out = made(sample)
    source = out["source"][out["source_mask"] == 1]
    target = out["tokens"][1:][out["weights"] == 1]
    assert source[-1] == target[-1] == END and out["tokens"][0] == SPECIAL.pad
    sentences = np.split(target[:-1], np.flatnonzero(IS_END[target[:-1]])[: (source == SPECIAL.mask).sum() - 1] + 1)
    parts = iter(sentences)
    filled = np.concatenate([next(parts) if token == SPECIAL.mask else [token] for token in source[:-1]])
    assert np.array_equal(filled, sample["tokens"][:num_raw])


def test_principal_sentences_have_the_highest_scores():
    higher = 0
    for seed in range(300):
        made, sample = stage(), window(seed)
        sentences = np.split(sample["tokens"][:60], np.flatnonzero(IS_END[sample["tokens"][:59]]) + 1)
        scores, gaps = rouge1_f1(sentences), made.gaps(sentences, seed)
        assert len(gaps) == max(1, round(0.3 * len(sentences)))
        assert min(scores[list(gaps)]) >= max(np.delete(scores, list(gaps)), default=0.0)
        other = stage(choice="random").gaps(sentences, seed)
        higher += scores[list(gaps)].mean() > scores[list(other)].mean()
    assert higher > 250


def test_a_target_takes_whole_sentences_and_cuts_only_a_single_one():
    for seed in range(100):
        out = stage(target_length=8)(window(seed))
        target = out["tokens"][1:][out["weights"] == 1]
        assert target.size <= 8 and target[-1] == END
        assert (out["source"] == SPECIAL.mask).sum() == 1 or IS_END[target[-2]] or target.size < 8


def test_a_sample_depends_on_seed_and_position_alone():
    once, again = stage(choice="random")(window(3)), stage(choice="random")(window(3))
    assert all(np.array_equal(once[key], again[key]) for key in once)
    others = [stage(choice="random")({**window(3), "position": position})["source"] for position in range(10)]
    assert len({other.tobytes() for other in others}) > 3
