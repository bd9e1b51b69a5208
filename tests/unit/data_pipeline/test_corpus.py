"""Documents from files: repeatable, sorted, divided by hash, and everything left out is counted with its reason."""

import os
from itertools import islice

import pytest

from common.errors import UserError
from data_pipeline.text import readers
from data_pipeline.text.corpus import CorpusOptions, _Digests, documents, standard_library_documents


def texts(corpus):
    return [document.text for document in corpus]


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
    corpus = documents([tmp_path], CorpusOptions(heldout_fraction=0.2))
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
    (tmp_path / "latin.py").write_bytes("x\né".encode("latin-1"))
    (tmp_path / "notes.bin").write_bytes(b"not read at all")
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "again").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "site-packages").mkdir()
    corpus = documents([tmp_path])
    for _ in range(2):  # every pass counts anew
        assert [document.key for document in corpus] == ["good.py"]
        assert corpus.report.left_out.lines() == [
            "1: a folder of installed packages, first: site-packages",
            "1: a link to a folder, first: again",
            "1: another kind of file, first: notes.bin",
            "1: empty, first: empty.py",
            "1: exact duplicate, first: same.py",
            "1: file too large, first: large.py (above 1,000,000 bytes)",
            "1: line too long, first: long.py (1,001 characters)",
            "1: not UTF-8, first: latin.py, line 2",
            "1: not a regular file, first: pipe.txt",
        ]
        assert (corpus.report.num_files, corpus.report.num_documents, corpus.report.text_bytes) == (6, 1, 6)


def test_prose_is_cut_at_blank_lines_and_keeps_every_byte(tmp_path):
    text = "".join(f"line {number}\r\n" + "\n" * (number % 7 == 0) for number in range(3_000))
    (tmp_path / "play.txt").write_bytes(text.encode())
    found = list(documents([tmp_path / "play.txt"], CorpusOptions(text_document_bytes=1_000)))
    assert len(found) > 20
    assert "".join(document.text for document in found) == text
    assert all(document.text.endswith("\n\n") for document in found[:-1])


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029"])
def test_a_line_of_prose_ends_where_python_ends_it(tmp_path, end):
    text = f"\ufeffone\0{end}{end}smile 😀{end}{end}last"
    (tmp_path / "a.txt").write_text(text, newline="")
    found = texts(documents([tmp_path / "a.txt"], CorpusOptions(text_document_bytes=1)))
    assert found == [f"\ufeffone\0{end}{end}", f"smile 😀{end}{end}", "last"]


def test_what_is_not_utf8_in_prose_takes_nothing_else_with_it(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\n\ntwo\xe9\nmore\n\nthree\n")
    corpus = documents([tmp_path / "a.txt"], CorpusOptions(text_document_bytes=1))
    assert [(document.key, document.text) for document in corpus] == [("a.txt:0", "one\n\n"), ("a.txt:2", "three\n")]
    assert corpus.report.left_out.lines() == ["1: not UTF-8, first: a.txt, line 3 (byte 0xe9)"]


def test_prose_in_utf16_is_not_read_as_text_with_holes(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n", encoding="utf-16")
    corpus = documents([tmp_path / "a.txt"])
    assert texts(corpus) == []
    assert corpus.report.left_out.lines() == ["1: not UTF-8, first: a.txt (begins as UTF-16 does)"]


@pytest.mark.parametrize(("text", "parts"), [
    ("aaa bbb ccc ddd", ["aaa bbb", " ccc ddd"]), ("0123456789abcdefghij", ["01234567", "89abcdef", "ghij"]),
    ("éèàùôî", ["éèà", "ùôî"]), ("xéèàù", ["xéèà", "ù"]), ("aaa\nbbb\nc", ["aaa\nbbb\n", "c"]),
    ("12345678", ["12345678"]), ("x😀yz😀", ["x😀yz", "😀"])])
def test_prose_without_a_blank_line_is_cut_at_its_limit(tmp_path, monkeypatch, text, parts):
    monkeypatch.setattr(readers, "MAX_PROSE_BYTES", 8)
    (tmp_path / "a.txt").write_text(text)
    assert texts(documents([tmp_path / "a.txt"])) == parts


def test_names_that_are_no_utf8(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9\x1b[1m.txt")).write_text("some words")
    (tmp_path / os.fsdecode(b"caf\xe9.bin")).write_text("some words")
    corpus = documents([tmp_path])
    assert texts(corpus) == ["some words"]
    assert corpus.report.left_out.lines() == ["1: another kind of file, first: caf\\xe9.bin"]
    with pytest.raises(UserError, match=r"caf\\xe9.bin is none of"):
        documents([tmp_path / os.fsdecode(b"caf\xe9.bin")])


def test_suffixes_in_capitals_and_code_by_a_list(tmp_path):
    for name in ("A.TXT", "main.c", "view.blade.php", "other.php", ".c"):
        (tmp_path / name).write_text(name)
    assert texts(documents([tmp_path])) == ["A.TXT"]
    corpus = documents([tmp_path], CorpusOptions(code_suffixes=(".c", ".blade.php")))
    assert texts(corpus) == ["A.TXT", "main.c", "view.blade.php"]
    assert corpus.report.left_out.counts == {"another kind of file": 2}


def test_every_wrong_path_is_named(tmp_path):
    (tmp_path / "image.png").write_bytes(b"")
    (tmp_path / "void").mkdir()
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(UserError, match="none.txt does not exist; .*image.png is none of .*; .*void holds no .*; "
                                        ".*pipe.txt is not a regular file"):
        documents([tmp_path / "none.txt", tmp_path / "image.png", tmp_path / "void", tmp_path / "pipe.txt"])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list every folder")
def test_a_folder_that_cannot_be_listed_is_named(tmp_path):
    (tmp_path / "closed").mkdir(mode=0)
    (tmp_path / "a.txt").write_text("some words")
    with pytest.raises(UserError, match="cannot read .*closed"):
        documents([tmp_path])


@pytest.mark.parametrize(("options", "message"), [
    ({"heldout_fraction": 1.5}, "heldout_fraction=1.5"), ({"field": ""}, "field is empty"),
    ({"code_suffixes": (".c", "rs")}, "begin with a dot.*got rs")])
def test_impossible_options(options, message):
    with pytest.raises(UserError, match=message):
        CorpusOptions(**options)


def test_digests_are_a_set():
    seen, known = _Digests(), set()
    for number in range(3_000):  # few different bytes, so that hashes lie across each other
        digest = bytes([0, 0, *((number % 500 * 7919 >> shift) & 1 for shift in range(14))])
        assert seen.add(digest) == (digest not in known)
        known.add(digest)
    assert len(known) == 500
