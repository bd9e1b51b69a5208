"""An exported tokenizer, read by transformers, gives the same ids for any text, and the same text back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from common.errors import UserError
from data_pipeline.corruption.special_ids import SpecialIds
from data_pipeline.text.token_pieces import vocabulary
from data_pipeline.text.tokenizer import SPACE_RUNS, Tokenizer, TokenizerOptions, train_tokenizer
from pretrain.config.run_config import load_config
from pretrain.hf.tokenizer_export import export_tokenizer, special_ids
from pretrain.models import FAMILIES
from tests.helpers.recipes import recipe_of

transformers = pytest.importorskip("transformers")

REPOSITORY = Path(__file__).parents[3]
MODEL_TYPES = {"gpt": "gpt2", "t5": "t5", "bart": "bart", "bert": "bert", "clip": "clip"}
AWKWARD = ("\t", "\n", "\r\n", "  ", " " * 7, "\u2581", "\ufeff", "\ufffd", "\0", "<unk>", "<0x41>", "<|endoftext|>",
           "😀", "👩‍👩‍👧", "漢字", "かな", "한", "é", "e\u0301", "<pad>", "[MASK]", "<extra_id_0>")


def config_of(family, folder, objective=None):
    content = {**recipe_of(family), "data": {"train": "none"}}
    content |= {"objective": {"name": objective}} if objective else {}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return load_config(folder / "recipe.yaml")


@pytest.fixture(scope="session")
def tokenizer(dataset) -> Tokenizer:
    return Tokenizer.load(dataset / "tokenizer.model")


def exported(tokenizer, folder, family="gpt", objective=None):
    """What AutoTokenizer makes of the files, beside a config of the family's own model there."""
    config = config_of(family, folder, objective)
    export_tokenizer(tokenizer, config, folder)
    (folder / "config.json").write_text(json.dumps({"model_type": MODEL_TYPES[family]}))
    return config, transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def theirs(tokenizer, tmp_path_factory):
    return exported(tokenizer, tmp_path_factory.mktemp("exported"))[1]


@pytest.fixture(scope="session")
def pieces(tokenizer) -> list[str]:
    return [piece.text for piece in vocabulary(tokenizer).pieces if piece.kind in ("normal", "user_defined")]


def same(tokenizer, theirs, text: str) -> None:
    ids = tokenizer.encode(text)
    assert theirs.encode(text, add_special_tokens=False) == ids
    assert theirs.decode(ids) == text


@given(text=st.lists(st.sampled_from(AWKWARD) | st.text(max_size=6), max_size=20).map("".join))
@example(text="")
@example(text=" leading and trailing  ")
@example(text="def f(x):\n\tif x:\r\n        return '漢字かな 😀'\n")
@example(text="<|endoftext|><unk><0x41><s>")
@settings(max_examples=300, deadline=None)
def test_same_ids_for_any_text(tokenizer, theirs, text):
    same(tokenizer, theirs, text)


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_same_ids_for_texts_made_of_pieces(tokenizer, theirs, pieces, data):
    """Few different pieces in a row: many merges compete."""
    few = data.draw(st.lists(st.sampled_from(pieces), min_size=1, max_size=3))
    same(tokenizer, theirs, "".join(data.draw(st.lists(st.sampled_from(few), max_size=16))))


@pytest.mark.parametrize("length", [*range(1, 30), 50, 1000])
def test_same_ids_for_runs_of_spaces(tokenizer, theirs, length):
    assert max(SPACE_RUNS) < 30
    for text in (" " * length, " " * length + "x", "x" + " " * length, "\t" * length, "=" * length):
        same(tokenizer, theirs, text)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, tokenizer, tmp_path):
    config, theirs = exported(tokenizer, tmp_path, family)
    same(tokenizer, theirs, "def f(x):\n\treturn  x <pad> [MASK]\n")
    assert (theirs.eos_token_id, theirs.model_max_length) == (tokenizer.end_of_text, config.model.sequence_length)
    assert Tokenizer.load(tmp_path / "tokenizer.model").sha256 == tokenizer.sha256
    for name, token in special_ids(config).items():
        assert theirs.convert_tokens_to_ids(name) == token
        assert theirs.encode(name, add_special_tokens=False, split_special_tokens=False) == [token]
        assert theirs.decode([token], skip_special_tokens=True) == ""
    text = tokenizer.encode("return")
    special, end = SpecialIds.at_top(config.model.vocab_size), tokenizer.end_of_text
    framed = {"gpt": text, "t5": [*text, end], "bart": [special.start, *text, end], "clip": [*text, end],
              "bert": [special.start, *text, special.separator]}
    assert theirs("return").input_ids == framed[family]
    assert theirs("return", "return").input_ids == framed[family] + framed[family][family in ("bart", "bert"):]
    pad = {"gpt": end, "clip": end}.get(family, special.pad)
    assert theirs(["return", "return return"], padding=True).input_ids[0][-1] == pad


def test_sentinels_of_the_middle(tokenizer, tmp_path):
    config, theirs = exported(tokenizer, tmp_path, "gpt", "fill_in_the_middle")
    first = SpecialIds.at_top(config.model.vocab_size).first_sentinel
    ids = theirs.convert_tokens_to_ids(["<fim_prefix>", "<fim_suffix>", "<fim_middle>"])
    assert ids == [first, first - 1, first - 2]


def test_a_piece_with_the_name_of_a_special_token(tokenizer, tmp_path):
    proto = ModelProto.FromString(tokenizer.model)
    proto.pieces[-1].piece = "<pad>"
    changed = Tokenizer(proto.SerializeToString())
    config, theirs = exported(changed, tmp_path, "t5")
    assert theirs.pad_token == "<<pad>>"
    assert theirs.pad_token_id == SpecialIds.at_top(config.model.vocab_size).pad
    same(changed, theirs, "<pad> <<pad>>")


def test_what_is_not_exported(tokenizer, tmp_path):
    config = config_of("gpt", tmp_path)
    unigram = train_tokenizer([(REPOSITORY / "README.md").read_text()], TokenizerOptions(400, "unigram"))
    with pytest.raises(UserError, match="unigram.*--algorithm bpe"):
        export_tokenizer(unigram, config, tmp_path)
    proto = ModelProto.FromString(tokenizer.model)
    proto.normalizer_spec.add_dummy_prefix = True
    with pytest.raises(UserError, match="add_dummy_prefix"):
        export_tokenizer(Tokenizer(proto.SerializeToString()), config, tmp_path)
    with pytest.raises(UserError, match="No such file"):
        export_tokenizer(tokenizer, config, tmp_path / "nowhere")
