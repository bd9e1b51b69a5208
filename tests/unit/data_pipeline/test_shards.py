"""Written datasets: the same bytes every time, readable by stock tools, complete or absent."""

import gc
import multiprocessing
import resource
import tarfile

import numpy as np
import pytest
import webdataset

from common.errors import DataError, StorageError, UserError
from common.files import LOCK_NAME
from data_pipeline.folder.manifest import Manifest
from data_pipeline.folder.shard_index import read_index
from data_pipeline.folder.shard_writer import member_key
from data_pipeline.text.corpus import Document
from data_pipeline.tokens.token_dataset import TokenDataset
from data_pipeline.tokens.token_writer import write_dataset
from data_pipeline.verify import verify


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_two_runs_are_byte_identical(corpus, tokenizer, dataset_folder, tmp_path):
    written = write_dataset(corpus, tokenizer, tmp_path / "again", shard_bytes=8_000, num_threads=2)
    assert contents(tmp_path / "again") == contents(dataset_folder)
    assert len(written.manifest.shards) > 2
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def test_documents_come_back(corpus, tokenizer, dataset):
    assert len(dataset) == len(corpus)
    for number, document in enumerate(corpus):
        tokens = dataset.tokens(number)
        assert tokens[-1] == tokenizer.end_of_text
        assert tokenizer.decode(tokens) == document.text
        assert len(tokens) == dataset.token_counts[number]


def test_stock_readers_agree_with_the_index(dataset, dataset_folder):
    """tarfile finds each payload where the index says; webdataset reads the same documents in the same order."""
    number = 0
    for entry in dataset.manifest.shards:
        rows = read_index(dataset_folder, entry, entry.num_documents, 3).rows
        with tarfile.open(dataset_folder / entry.name) as archive:
            assert [(m.offset_data, m.size) for m in archive] == [(offset, size) for offset, size, _ in rows.tolist()]
        url = str(dataset_folder / entry.name)
        for sample in webdataset.WebDataset(url, shardshuffle=False):
            assert sample["tokens"] == dataset.tokens(number).tobytes()
            number += 1
    assert number == len(dataset)


def test_manifest_counts(dataset, corpus, tokenizer):
    manifest = dataset.manifest
    assert manifest.text_bytes == sum(len(document.text.encode()) for document in corpus)
    assert manifest.num_tokens == dataset.token_counts.sum()
    assert (manifest.dtype, manifest.vocab_size) == ("<u2", 400)
    assert manifest.tokenizer.sha256 == tokenizer.sha256


def test_reuse(corpus, tokenizer, copied_folder):
    assert write_dataset(corpus, tokenizer, copied_folder, shard_bytes=8_000).is_reused
    for documents, size in ((corpus[:-1], 8_000), (corpus, 9_000)):
        with pytest.raises(UserError, match="made from other documents, tokenizer or settings"):
            write_dataset(documents, tokenizer, copied_folder, shard_bytes=size)
    next(copied_folder.glob("*.tar")).unlink()
    with pytest.raises(DataError, match="in the way.*is missing"):
        write_dataset(corpus, tokenizer, copied_folder, shard_bytes=8_000)


def test_keys_have_no_dots_and_fit_a_plain_header():
    key = member_key(7, "../" + "é" * 300 + "/a.b.py")
    assert key == "000000000007-a-b-py"
    assert member_key(7, "...") == "000000000007"


def failing_documents(documents):
    yield from documents
    raise RuntimeError("the source broke")


def test_a_failed_writer_leaves_nothing(corpus, tokenizer, tmp_path):
    with pytest.raises(RuntimeError, match="the source broke"):
        write_dataset(failing_documents(corpus * 3), tokenizer, tmp_path / "set")
    with pytest.raises(UserError, match="no document is left for split 'heldout'"):
        write_dataset([], tokenizer, tmp_path / "set", split="heldout")
    assert list(tmp_path.iterdir()) == []


def write_with_little_room(documents, tokenizer, folder, outcome):
    """In a process of its own: every file above 10 kB is refused by the kernel."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    try:
        write_dataset(documents, tokenizer, folder)
    except StorageError as error:
        outcome.put(error.message)


def test_no_room(corpus, tokenizer, tmp_path):
    context = multiprocessing.get_context("fork")
    outcome = context.SimpleQueue()
    process = context.Process(target=write_with_little_room, args=(corpus, tokenizer, tmp_path / "set", outcome))
    process.start()
    process.join(20)
    assert "cannot write" in outcome.get()
    assert list(tmp_path.iterdir()) == []


def test_no_room_is_said_and_nothing_else(corpus, tokenizer, tmp_path, capfd):
    """Writers that are collected later try to write once more, and Python reports what they raise."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    for documents, shard_bytes in ((corpus, 2**20), (corpus, 100), ([Document("a", "self " * 9_000)], 2**20)):
        with pytest.raises(StorageError, match="cannot write"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (7_000, old[1]))
            try:
                write_dataset(documents, tokenizer, tmp_path / "set", shard_bytes=shard_bytes)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, old)
        gc.collect()
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_place_of_the_folder(corpus, tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        write_dataset(corpus, tokenizer, tmp_path / "file")
    with pytest.raises(UserError, match="cannot write .*a file stands where a folder is needed"):
        write_dataset(corpus, tokenizer, tmp_path / "file" / "set")


def test_what_a_killed_writer_left_is_replaced(corpus, tokenizer, tmp_path):
    left = tmp_path / "set.tmp"
    left.mkdir()
    (left / LOCK_NAME).touch()
    (left / "shard-000000.tar").write_bytes(b"half")
    write_dataset(corpus, tokenizer, tmp_path / "set")
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    assert not any(report.problems for report in verify(tmp_path / "set"))


def test_what_others_left_is_not_touched(corpus, tokenizer, tmp_path):
    (tmp_path / "set.tmp").mkdir()
    (tmp_path / "set.tmp" / "precious").write_text("mine")
    with pytest.raises(UserError, match="was not made by this tool"):
        write_dataset(corpus, tokenizer, tmp_path / "set")
    assert (tmp_path / "set.tmp" / "precious").read_text() == "mine"


class WriterWithin:
    """Documents whose iteration starts a second writer of the same folder."""

    def __init__(self, documents, tokenizer, folder):
        self.arguments = (documents, tokenizer, folder)

    def __iter__(self):
        write_dataset(*self.arguments)
        return iter(self.arguments[0])


def test_two_writers_of_one_folder(corpus, tokenizer, tmp_path):
    with pytest.raises(UserError, match="another process is writing"):
        write_dataset(WriterWithin(corpus, tokenizer, tmp_path / "set"), tokenizer, tmp_path / "set")


def test_large_vocabulary_is_stored_in_four_bytes(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "vocab_size", 70_000)
    write_dataset([Document("a", "self")], tokenizer, tmp_path / "set")
    dataset = TokenDataset.open(tmp_path / "set")
    assert Manifest.load(tmp_path / "set").dtype == "<u4"
    assert dataset.tokens(0).dtype == np.uint32
    assert tokenizer.decode(dataset.tokens(0)) == "self"
