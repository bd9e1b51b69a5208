"""Text comes back exactly, training is repeatable, and wrong files are named."""

import pickle
import random
from itertools import product

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from common.errors import DataError, UserError
from data_pipeline.text.corpus import Document
from data_pipeline.text.tokenizer import Tokenizer, TokenizerOptions, load_report, measure, sample_text, train_tokenizer

# Characters that tokenizers like to lose, mixed into arbitrary text.
awkward = st.sampled_from(
    ["\t", "\n", "\r\n", "  ", " " * 7, "\u2581", "\ufeff", "\ufffd", "\0", "<s>", "<0x41>", "😀"]
)
texts = st.lists(awkward | st.text(max_size=6), max_size=20).map("".join)


@given(text=texts)
@example(text=" leading and trailing  ")
@example(text="def f(x):\n\tif x:\r\n        return '漢字かな'\n")
@example(text="<|endoftext|><unk>")
@settings(max_examples=300, deadline=None)
def test_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.end_of_text not in ids
    assert all(0 <= token < tokenizer.vocab_size for token in ids)


@given(st.lists(texts, max_size=5))
@settings(max_examples=30, deadline=None)
def test_threads_do_not_change_tokens(tokenizer, many):
    assert tokenizer.encode_many(many, num_threads=2) == [tokenizer.encode(text) for text in many]


def test_vocabulary_size_is_exact_and_indentation_is_short(tokenizer):
    assert tokenizer.vocab_size == 400
    assert len(tokenizer.encode(" " * 8)) == 1
    assert len(tokenizer.encode("\t")) == 1


def test_same_text_same_model(corpus, tokenizer):
    options = TokenizerOptions(vocab_size=400)
    assert train_tokenizer(sample_text(corpus, 1, options), options).sha256 == tokenizer.sha256


def test_save_load_pickle(tokenizer, tmp_path):
    path = tmp_path / "new" / "t.model"
    tokenizer.save(path, {"note": 1})
    loaded = Tokenizer.load(path)
    assert loaded.sha256 == tokenizer.sha256 == load_report(path)["sha256"]
    assert pickle.loads(pickle.dumps(loaded)).encode("self") == tokenizer.encode("self")
    assert sorted(file.name for file in path.parent.iterdir()) == ["t.model", "t.model.json"]


def test_measure(tokenizer, corpus):
    found = measure(tokenizer, corpus)
    assert (found.num_documents, found.num_round_trip_errors) == (60, 0)
    assert 1 < found.bytes_per_token < 20


def test_sample_is_a_share_of_the_corpus(corpus):
    total = sum(len(document.text.encode()) for document in corpus)
    sample = sample_text(corpus, total, TokenizerOptions(sample_bytes=total // 2))
    assert 0 < sum(len(block.encode()) for block in sample) < total
    assert "".join(sample_text(corpus, total, TokenizerOptions())) == "".join(d.text for d in corpus)


LETTERS = "abcdefghijklmnop"


@pytest.mark.parametrize("space", [" ", "\t", ""])
def test_a_text_of_one_long_line_is_cut_before_white_space(space):
    words = ["".join(LETTERS[number >> shift & 15] for shift in (0, 4, 8, 12)) for number in range(0, 65_536, 2)]
    text = space.join(words)
    assert len(text) > 100_000
    blocks = sample_text([Document("a", text)], 1, TokenizerOptions())
    assert "".join(blocks) == text
    assert len(blocks) > 20 and max(map(len, blocks)) < 4_001
    assert not space or all(block.startswith(space) for block in blocks[1:])
    some = "".join(sample_text([Document("a", text)], len(text), TokenizerOptions(sample_bytes=len(text) // 2)))
    assert 0.3 * len(text) < len(some) < 0.7 * len(text)


def test_what_a_line_above_the_limit_of_sentencepiece_holds_is_learnt():
    words = ["".join(letters) + "ρ" for letters in product("αβγδ", "εζηθ", "ικλμ", "νξοπ")]
    greek = " ".join(random.Random(0).choices(words, k=1_700_000))
    assert len(greek.encode()) > 1 << 24
    documents = [Document("greek", greek), Document("latin", "some words and others\n" * 50)]
    options = TokenizerOptions(vocab_size=400, sample_bytes=200_000)
    tokenizer = train_tokenizer(sample_text(documents, len(greek.encode()), options), options)
    assert sum("ρ" in piece for piece in tokenizer.pieces()) > 50


@pytest.mark.parametrize("content", [b"", b"not a model", b"\n\x0a"])
def test_not_a_model(tmp_path, content):
    path = tmp_path / "wrong.model"
    path.write_bytes(content)
    with pytest.raises(DataError, match="wrong.model"):
        Tokenizer.load(path)


def test_missing_model(tmp_path):
    with pytest.raises(UserError, match="cannot read tokenizer .*none.model: No such file"):
        Tokenizer.load(tmp_path / "none.model")


def test_more_vocabulary_than_text():
    with pytest.raises(UserError, match="vocab_size=4096 does not fit.*value <= "):
        train_tokenizer(["hello world"], TokenizerOptions(vocab_size=4096))


@pytest.mark.parametrize("text", ["\n" + "\u2585", "\u2585 \u2585"])
def test_text_that_sentencepiece_does_not_take_is_not_called_a_vocabulary(text):
    with pytest.raises(UserError, match="SentencePiece cannot train a bpe tokenizer on 3|2 characters"):
        train_tokenizer([text], TokenizerOptions())


@pytest.mark.parametrize("options", [{"vocab_size": 100}, {"algorithm": "magic"}])
def test_impossible_options(options):
    with pytest.raises(UserError, match=next(iter(options))):
        TokenizerOptions(**options)


def test_no_text():
    with pytest.raises(UserError, match="no text"):
        train_tokenizer([], TokenizerOptions())
