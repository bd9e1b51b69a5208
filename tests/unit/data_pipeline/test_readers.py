"""Records, Parquet, compressed files, tars and URLs: each record is a document or is counted with its reason."""

import bz2
import gzip
import io
import json
import subprocess
import sys
import tarfile

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.errors import UserError
from data_pipeline.text import readers
from data_pipeline.text.corpus import CorpusOptions, documents


def zstd(content):
    written = pa.BufferOutputStream()
    with pa.CompressedOutputStream(written, "zstd") as stream:
        stream.write(content)
    return written.getvalue().to_pybytes()


PACKED = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".zst": zstd}
LINES = "".join(json.dumps({"text": f"document {number} 😀"}) + "\n" for number in range(3_000)).encode()
DAMAGED = "damaged or cut short, and not read from there on"


def read(path, **options):
    """Texts and what was left out."""
    corpus = documents([path], CorpusOptions(**options))
    return [document.text for document in corpus], corpus.report.left_out


def write(path, content):
    path.write_bytes(content)
    return path


def test_records(tmp_path):
    lines = [b"\xef\xbb\xbf" + json.dumps({"text": "one"}).encode(), b"", b"{not json", b'{"other": 1, "x": 2}',
             b'{"text": 5}', b'["text"]', b'{"text": ""}', b'{"text": "\\ud800"}', b'{"text": "\xe9"}', b"\0" * 401,
             b"[" * 100_000, b'{"text": "cut', json.dumps({"text": "two\0\r\n"}).encode() + b"\r"]  # fmt: skip
    found, left_out = read(write(tmp_path / "set.jsonl", b"\n".join(lines)))
    assert found == ["one", "two\0\r\n"]
    assert left_out.lines() == [
        "4: not JSON, first: set.jsonl, line 3 (Expecting property name enclosed in double quotes)",
        "2: not UTF-8, first: set.jsonl, line 8",
        "1: empty, first: set.jsonl, line 7",
        '1: field "text" is not a string, first: set.jsonl, line 5 (int)',
        '1: no field "text", first: set.jsonl, line 4 (it has other, x)',
        "1: not a JSON object, first: set.jsonl, line 6"]


@pytest.mark.parametrize(("record", "field", "text"), [
    ({"content": "a", "text": "b"}, "content", "a"), ({"meta": {"text": "a"}}, "meta.text", "a"),
    ({"meta.text": "a", "meta": {"text": "b"}}, "meta.text", "a"), ({"a": {"b": {"c": "a"}}}, "a.b.c", "a"),
    ({"meta": "b"}, "meta.text", None), ({"meta": {"text": None}}, "meta.text", None), ({"meta": {}}, "meta", None)])
def test_fields_of_records_and_rows(tmp_path, record, field, text):
    files = [write(tmp_path / "a.jsonl", json.dumps(record).encode()), tmp_path / "a.parquet"]
    if record != {"meta": {}}:  # Parquet has no empty objects
        pq.write_table(pa.Table.from_pylist([record]), files[1])
    for path in filter(lambda path: path.exists(), files):
        found, left_out = read(path, field=field)
        assert found == ([text] if text else [])
        assert sum(left_out.counts.values()) == (0 if text else 1)
        assert all(f'field "{field}"' in reason for reason in left_out.counts)


def test_a_record_above_the_limit_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_RECORD_BYTES", 50)
    lines = [json.dumps({"text": "x" * length}) for length in (10, 200, 38, 37, 11)]
    found, left_out = read(write(tmp_path / "a.jsonl", "\n".join(lines).encode()))
    assert list(map(len, found)) == [10, 37, 11]
    assert left_out.lines() == ["2: record too long, first: a.jsonl, line 2 (above 50 bytes)"]


@pytest.mark.parametrize(("content", "texts", "counts"), [
    ('{"text": "a"}\n{"text": "b"}\n', ["a", "b"], {}),
    ('{\n "text": "a",\n "n": 1\n}\n', ["a"], {}),
    ('[{"text": "a"},\n {"text": "b"}, 3]', ["a", "b"], {"not a JSON object": 1}),
    ('{"text": "a"}', ["a"], {}), ("\n", [], {"empty": 1}),
    ('{"text": "a"},\n{"text": "b"}\n{"text": "c"}', ["b", "c"], {"not JSON": 1})])
@pytest.mark.parametrize("limit", [2**26, 16])  # whole, or more than is read at a time
def test_json_of_one_object_a_line_or_one_for_the_file(tmp_path, monkeypatch, content, texts, counts, limit):
    if limit == 16 and (content.startswith(("[", "{\n"))):
        return  # JSON over several lines has to be read whole
    monkeypatch.setattr(readers, "MAX_JSON_BYTES", limit)
    found, left_out = read(write(tmp_path / "a.json", content.encode()))
    assert (found, dict(left_out.counts)) == (texts, counts)


@pytest.mark.parametrize("suffix", PACKED)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "a.py", "a.tar"])
def test_every_kind_compressed_is_the_same(tmp_path, suffix, name):
    content = LINES
    if name == "a.py":
        content = b"x = 1\n"
    elif name == "a.tar":
        content = tar({"b.jsonl": LINES})
    plain = [document.text for document in documents([write(tmp_path / name, content)])]
    parts = PACKED[suffix](content[:50_000]) + PACKED[suffix](content[50_000:])  # as `cat a.gz b.gz` makes them
    for packed in (PACKED[suffix](content), parts):
        found, left_out = read(write(tmp_path / f"{name}{suffix}", packed))
        assert found == plain and len(plain) == (3_000 if name in ("a.jsonl", "a.json", "a.tar") else 1)
        assert not left_out.counts


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".zst"])
@pytest.mark.parametrize(("harm", "least"), [
    (lambda packed: packed[: len(packed) // 2], 0), (lambda packed: packed[:-1], 0),
    (lambda packed: packed + b"other", 2_900), (lambda packed: b"not packed at all", 0)])
def test_damage_of_a_compressed_file_is_told(tmp_path, suffix, harm, least):
    path = write(tmp_path / f"a.jsonl{suffix}", harm(PACKED[suffix](LINES)))
    found, left_out = read(path)
    if suffix == ".bz2" and least:  # what follows the end of a bz2 file is ignored by every reader
        assert len(found) == 3_000
        return
    assert left_out.counts[DAMAGED] == 1
    assert least <= len(found) <= 3_000
    assert f"a.jsonl{suffix} (" in left_out.examples[DAMAGED]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet(tmp_path, kind):
    rows = pa.array(["one", None, "", "two 😀", *(f"row {number}" for number in range(300))]).cast(kind)
    pq.write_table(pa.table({"text": rows, "other": range(304)}), tmp_path / "a.parquet", row_group_size=100)
    found, left_out = read(tmp_path / "a.parquet")
    assert found == ["one", "two 😀", *(f"row {number}" for number in range(300))]
    assert left_out.lines() == ["1: empty, first: a.parquet, row 3",
                                '1: field "text" is not a string, first: a.parquet, row 2 (NoneType)']
    found, left_out = read(tmp_path / "a.parquet", field="content")
    assert left_out.lines() == ['304: no field "content", first: a.parquet (it has text, other)']


def test_parquet_that_is_not_utf8_or_damaged(tmp_path):
    broken = pa.Array.from_buffers(pa.string(), 2, pa.array([b"one", b"\xe9"]).buffers())
    pq.write_table(pa.table({"text": broken}), tmp_path / "a.parquet")
    found, left_out = read(tmp_path / "a.parquet")
    assert (found, left_out.lines()) == (["one"], ["1: not UTF-8, first: a.parquet, row 2"])
    pq.write_table(pa.table({"text": [f"row {number}" for number in range(5_000)]}), tmp_path / "b.parquet")
    content = (tmp_path / "b.parquet").read_bytes()
    for harmed in (content[: len(content) // 2], b"", content[:400] + bytes(2_000) + content[2_400:]):
        found, left_out = read(write(tmp_path / "b.parquet", harmed))
        assert found == [] and left_out.counts == {DAMAGED: 1}


def tar(members):
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w") as archive:
        for name, content in members.items():
            member = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            payload = content if isinstance(content, bytes) else b""
            member.size = len(payload)
            archive.addfile(member, io.BytesIO(payload))
    return written.getvalue()


def link(name):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
    return member


def test_members_of_a_tar(tmp_path):
    packed = gzip.compress(LINES.partition(b"\n")[0])
    members = {"1.txt": b"some prose", "1.json": b'{"text": "of json"}', "2.jsonl.gz": packed,
               "1.jpg": b"picture", "._1.txt": b"\0\5\x16\7", "x.txt": link("x.txt"), "cut.txt.gz": b"\x1f\x8b",
               "../../up.md": b"above"}  # fmt: skip
    found, left_out = read(write(tmp_path / "a.tar", tar(members)))
    assert found == ["some prose", "of json", "document 0 😀", "above"]
    assert left_out.lines() == [
        "1: a note of macOS on another file, first: a.tar/._1.txt",
        "1: another kind of file, first: a.tar/1.jpg",
        f"1: {DAMAGED}, first: a.tar/cut.txt.gz (Compressed file ended before the end-of-stream marker was reached)",
        "1: not a regular file, first: a.tar/x.txt"]


@pytest.mark.parametrize("harm", [
    lambda whole: whole[: 3 * 512], lambda whole: whole[: 2 * 512 + 100], lambda whole: whole[: 2 * 512],
    lambda whole: whole[: 2 * 512] + b"x" * 512 + whole[3 * 512 :]])
def test_a_tar_that_does_not_end_as_one_is_told(tmp_path, harm):
    whole = tar({"1.txt": b"first", "2.txt": b"second"})
    found, left_out = read(write(tmp_path / "a.tar", harm(whole)))
    assert found == ["first"]
    assert left_out.counts == {DAMAGED: 1}


@pytest.mark.parametrize("content", [b"", b"no tar" * 300])
def test_what_is_no_tar(tmp_path, content):
    found, left_out = read(write(tmp_path / "a.tar", content))
    assert (found, left_out.counts) == ([], {DAMAGED: 1})


def test_a_tar_with_a_huge_header_is_not_read_into_memory(tmp_path):
    header = tarfile.TarInfo("./PaxHeader")
    header.type, header.size = tarfile.XHDTYPE, 2**32
    found, left_out = read(write(tmp_path / "a.tar", tar({"1.txt": b"first"})[:1024] + header.tobuf()))
    assert found == ["first"]
    assert "a header of 4,294,967,296 bytes" in left_out.examples[DAMAGED]


def test_urls(tmp_path):
    system = fsspec.filesystem("memory")
    system.pipe("/corpus/b.jsonl", LINES)
    system.pipe("/corpus/sub/a.txt.gz", gzip.compress(b"prose"))
    system.pipe("/corpus/c.png", b"")
    system.pipe("/corpus/d.tar", tar({"1.txt": b"of a tar"}))
    pq.write_table(pa.table({"text": ["of Parquet"]}), tmp_path / "e.parquet")
    system.pipe("/corpus/e.parquet", (tmp_path / "e.parquet").read_bytes())
    found, left_out = read("memory://corpus")
    assert found[3_000:] == ["of a tar", "of Parquet", "prose"]
    assert left_out.lines() == ["1: another kind of file, first: c.png"]
    assert read("memory://corpus/b.jsonl")[0] == found[:3_000]


@pytest.mark.parametrize(("url", "message"), [
    ("memory://nowhere/a.txt", "does not exist"), ("nosuch://bucket/a.txt", "cannot read nosuch://.*fsspec"),
    ("memory://corpus-of-pictures", "holds no .*txt")])
def test_urls_that_cannot_be_read(url, message):
    fsspec.filesystem("memory").pipe("/corpus-of-pictures/c.png", b"")
    with pytest.raises(UserError, match=message):
        documents([url])


PEAK = """
import resource, sys
from data_pipeline.text.corpus import documents
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert sum(1 for _ in documents([sys.argv[1]])) > 1_000
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units")
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.txt.gz", "a.tar"])
def test_reading_takes_much_less_memory_than_the_file(tmp_path, name):
    """40 MB with some emoji, which make a string four times as large."""
    line = "some words 😀 " * 500
    content = "".join(json.dumps({"text": f"{number} {line}"}, ensure_ascii=False) + "\n" for number in range(5_000))
    if name.startswith("a.txt"):
        content = content.replace("\n", "\n\n")
    content = content.encode()
    packed = gzip.compress(content, 1) if name.endswith(".gz") else content
    write(tmp_path / name, tar({"a.jsonl": content}) if name == "a.tar" else packed)
    done = subprocess.run([sys.executable, "-c", PEAK, tmp_path / name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 10e6 < len(content) / 4
