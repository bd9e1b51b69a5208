"""`trainyard data ...` from raw text to a verified dataset, twice, and on wrong input."""

import argparse
import json
import os

import pytest

from common.errors import UserError
from data_pipeline.tokens.token_dataset import TokenDataset
from pretrain.commands import data


def trainyard(*words):
    parser = argparse.ArgumentParser()
    data.add_parser(parser.add_subparsers())
    return data.run(parser.parse_args(["data", *map(str, words)]))


@pytest.fixture
def source(tmp_path, corpus):
    folder = tmp_path / "source"
    folder.mkdir()
    for number, document in enumerate(corpus):
        (folder / f"{number:03d}.py").write_text(document.text)
    return folder


def test_from_text_to_a_dataset_and_again(source, tmp_path, capsys):
    model, folder = tmp_path / "t.model", tmp_path / "train"
    make_tokenizer = ("tokenizer", "--input", source, "--vocab-size", 400, "--to", model, "--heldout-fraction", 0.1)
    make_shards = ("shard", "--input", source, "--tokenizer", model, "--to", folder, "--heldout-fraction", 0.1)
    for verb in (make_tokenizer, make_shards):
        assert trainyard(*verb) == 0
        first = capsys.readouterr().out
        assert trainyard(*verb) == 0
        second = capsys.readouterr().out
        assert "reused" not in first and "wrote" in first
        assert "reused" in second and "wrote" not in second
        assert "per token" in first and first.strip().splitlines()[-1] == second.strip().splitlines()[-1]
    assert trainyard(*make_shards, "--to", tmp_path / "heldout", "--split", "heldout") == 0
    assert len(TokenDataset.open(folder)) + len(TokenDataset.open(tmp_path / "heldout")) == 60
    assert trainyard("verify", folder) == 0
    assert trainyard("stats", folder) == 0
    assert "end-of-text is 1" in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["shard", "tokenizer"])
def test_when_nothing_is_left_the_reasons_are_said(tmp_path, tokenizer, verb):
    (tmp_path / "a.jsonl").write_text('{"content": "a", "n": 1}\n' * 800)
    tokenizer.save(tmp_path / "t.model", {})
    words = (verb, "--input", tmp_path / "a.jsonl", "--to", tmp_path / "new")
    words += ("--tokenizer", tmp_path / "t.model") if verb == "shard" else ()
    with pytest.raises(UserError, match=r"(?s)no document is left.*\(--field\).*"
                                        r'800: no field "text", first: a.jsonl, line 1 \(it has content, n\)'):
        trainyard(*words)
    assert not (tmp_path / "new").exists()


def test_fields_and_suffixes_of_code(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"meta": {"body": "one"}}\n')
    (tmp_path / "b[b].c").write_text("int x;\n")
    (tmp_path / "c[red].png").write_bytes(b"")
    assert trainyard("corpus", "--input", tmp_path, "--field", "meta.body", "--code-suffix", ".c", ".h",
                     "--to", tmp_path / "out" / "all.jsonl") == 0
    out = capsys.readouterr().out
    assert "2 documents" in out and "left out 1: another kind of file, first: c[red].png" in out
    lines = (tmp_path / "out" / "all.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == ["a.jsonl:0", "b[b].c"]


def test_a_name_that_is_no_utf8_is_written_as_escapes(tmp_path):
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / os.fsdecode(b"caf\xe9.txt")).write_text("some words")
    assert trainyard("corpus", "--input", folder, "--to", tmp_path / "all.jsonl") == 0
    assert json.loads((tmp_path / "all.jsonl").read_text()) == {"key": "caf\\xe9.txt:0", "text": "some words"}


@pytest.mark.parametrize("words", [
    ("corpus", "--input", "stdlib", "--to", "s3://bucket/x"), ("tokenizer", "--input", "stdlib", "--to", "memory://x"),
    ("shard", "--input", "stdlib", "--tokenizer", "t.model", "--to", "http://host/x"),
    ("shard", "--input", "stdlib", "--tokenizer", "s3://bucket/t.model", "--to", "x"),
    ("shapes", "--to", "s3://bucket/x"), ("images", "--input", "x", "--tokenizer", "x", "--to", "s3://bucket/x")])
def test_a_url_is_no_place_to_write(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_of_argparse:
        trainyard(*words)
    assert exit_of_argparse.value.code == 2
    assert "is a URL; give a path of this machine" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_verify_reports_damage(copied_folder, capsys):
    (copied_folder / "shard-000002.tar").write_bytes(b"<html>")
    assert trainyard("verify", copied_folder) == 65
    assert "shard-000002.tar" in capsys.readouterr().out


def test_corpus(source, tmp_path, capsys):
    records = tmp_path / "set.jsonl"
    for outcome in ("wrote", "reused"):
        assert trainyard("corpus", "--input", source, "--to", records) == 0
        assert outcome in capsys.readouterr().out
    assert trainyard("corpus", "--input", records) == 0
    assert "60 documents" in capsys.readouterr().out
    records.write_text("mine")
    with pytest.raises(UserError, match="other content"):
        trainyard("corpus", "--input", source, "--to", records)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set.jsonl", "source"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("corpus", "--input", "nowhere"), "nowhere does not exist"),
        (("stats", "nowhere"), "nowhere does not exist"),
        (("verify", "nowhere"), "nowhere does not exist"),
        (("tokenizer", "--input", "stdlib", "--vocab-size", 7, "--to", "x"), "vocab_size=7 is too small"),
        (("shard", "--input", "stdlib", "--tokenizer", "none.model", "--to", "x"), "cannot read tokenizer none.model"),
    ],
)
def test_wrong_input(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        trainyard(*words)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_tokenizer_is_not_overwritten(source, tmp_path):
    (tmp_path / "t.model").write_bytes(b"mine")
    with pytest.raises(UserError, match="exists and was made from other input"):
        trainyard("tokenizer", "--input", source, "--vocab-size", 400, "--to", tmp_path / "t.model")
    assert (tmp_path / "t.model").read_bytes() == b"mine"
