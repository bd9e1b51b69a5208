"""Documents from files: repeatable, sorted, divided by hash, and everything left out is counted."""

import json
from itertools import islice

import pytest

from common.errors import UserError
from data_pipeline.text.corpus import CorpusLimits, documents, standard_library_documents


def test_standard_library_is_sorted_and_without_third_parties():
    corpus = standard_library_documents()
    keys = [key for key, _ in corpus.files]
    assert len(keys) > 500
    assert keys == sorted(keys)
    assert not any("site-packages" in key for key in keys)
    assert list(islice(corpus, 20)) == list(islice(corpus, 20))


def test_parts_are_disjoint_and_complete(tmp_path):
    for number in range(200):
        (tmp_path / f"{number}.py").write_text(f"x = {number}\n")
    corpus = documents([tmp_path], CorpusLimits(heldout_fraction=0.2))
    train, heldout = (set(corpus.select(part)) for part in ("train", "heldout"))
    assert train.isdisjoint(heldout)
    assert train | heldout == set(corpus)
    assert 15 < len(heldout) < 70


def test_what_is_left_out_is_counted(tmp_path):
    (tmp_path / "good.py").write_text("x = 1\n")
    (tmp_path / "same.py").write_text("x = 1\n")
    (tmp_path / "long.py").write_text("#" * 1_001)
    (tmp_path / "large.py").write_text("#\n" * 500_001)
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "latin.py").write_bytes("é".encode("latin-1"))
    (tmp_path / "notes.bin").write_bytes(b"not read at all")
    corpus = documents([tmp_path])
    assert [document.key for document in corpus] == ["good.py"]
    assert dict(corpus.report.skipped) == {
        "exact duplicate": 1, "line too long": 1, "file too large": 1, "empty": 1, "not UTF-8": 1,
    }  # fmt: skip
    assert (corpus.report.num_files, corpus.report.num_documents, corpus.report.text_bytes) == (6, 1, 6)


def test_prose_is_cut_at_blank_lines_and_keeps_every_byte(tmp_path):
    text = "".join(f"line {number}\r\n" + "\n" * (number % 7 == 0) for number in range(3_000))
    (tmp_path / "play.txt").write_bytes(text.encode())
    found = list(documents([tmp_path / "play.txt"], CorpusLimits(text_document_bytes=1_000)))
    assert len(found) > 20
    assert "".join(document.text for document in found) == text
    assert all(document.text.endswith("\n\n") for document in found[:-1])


def test_records(tmp_path):
    lines = [json.dumps({"text": "one"}), "", "{not json", '{"other": 1}', '{"text": 5}', '["text"]', '{"text": ""}',
             '{"text": "\\ud800"}', json.dumps({"text": "two"})]  # fmt: skip
    (tmp_path / "set.jsonl").write_text("\n".join(lines))
    corpus = documents([tmp_path / "set.jsonl"])
    assert [document.text for document in corpus] == ["one", "two"]
    assert dict(corpus.report.skipped) == {'no "text" in record': 4, "empty": 1, "not UTF-8": 1}


def test_every_wrong_path_is_named(tmp_path):
    (tmp_path / "image.png").write_bytes(b"")
    (tmp_path / "void").mkdir()
    with pytest.raises(UserError, match="none.txt does not exist; .*image.png is none of .*; .*void holds no"):
        documents([tmp_path / "none.txt", tmp_path / "image.png", tmp_path / "void"])


def test_impossible_share():
    with pytest.raises(UserError, match="heldout_fraction=1.5"):
        CorpusLimits(heldout_fraction=1.5)
