"""A missing, shortened, exchanged or changed file is an error that names it; `verify` finds what opening cannot."""

import json
import os
import pickle

import numpy as np
import pytest

from common.errors import DataError
from data_pipeline.config import DataConfig, problems
from data_pipeline.folder.manifest import Manifest
from data_pipeline.order import DocumentSpan
from data_pipeline.tokens.token_dataset import TokenDataset
from data_pipeline.verify import verify

SHARD = "shard-000001.tar"
INDEX = "shard-000001.index.npy"


def overwrite(path, offset, content):
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(content)


def read_all(folder):
    dataset = TokenDataset.open(folder)
    for document in range(len(dataset)):
        dataset.window([DocumentSpan(document, 0, int(dataset.token_counts[document]))])


def found_by_verify(folder):
    return {report.name: " ".join(report.problems) for report in verify(folder) if report.problems}


def test_a_sound_dataset(dataset_folder):
    read_all(dataset_folder)
    assert found_by_verify(dataset_folder) == {}
    assert list(problems(DataConfig(train=str(dataset_folder)), 64, 400)) == []


@pytest.mark.parametrize("name", [SHARD, INDEX])
def test_missing_file(copied_folder, name):
    (copied_folder / name).unlink()
    with pytest.raises(DataError, match=f"{name} is missing"):
        TokenDataset.open(copied_folder)
    [(where, _, possible, _)] = problems(DataConfig(train=str(copied_folder)), 64, 400)
    assert where == "data.train"
    assert f"{name} is missing" in possible
    assert found_by_verify(copied_folder).keys() == {SHARD}


@pytest.mark.parametrize("num_bytes", [0, 512, 5_000])
def test_truncated_shard(copied_folder, num_bytes):
    os.truncate(copied_folder / SHARD, num_bytes)
    with pytest.raises(DataError, match=f"{SHARD} has {num_bytes:,} bytes where the manifest says"):
        TokenDataset.open(copied_folder)
    [(_, _, possible, _)] = problems(DataConfig(train=str(copied_folder)), 64, 400)
    assert SHARD in possible
    assert found_by_verify(copied_folder).keys() == {SHARD}


def test_shard_that_shrinks_while_it_is_read(copied_folder):
    """Touching the lost pages would kill the process."""
    dataset = TokenDataset.open(copied_folder)
    dataset.tokens(0)
    os.truncate(copied_folder / "shard-000000.tar", 512)
    with pytest.raises(DataError, match=r"shard-000000.tar shrank to 512 bytes while it was being read"):
        dataset.tokens(0)
    with pytest.raises(DataError, match="shrank"):
        dataset.tokens(1)


def test_bit_flipped_in_a_header(copied_folder):
    overwrite(copied_folder / SHARD, 3, b"X")
    with pytest.raises(DataError, match=rf"document \d+ at byte 512 of .*{SHARD}: no tar header"):
        read_all(copied_folder)
    assert "SHA-256" in found_by_verify(copied_folder)[SHARD]


def test_bit_flipped_in_tokens_is_found_by_verify(copied_folder):
    overwrite(copied_folder / SHARD, 512, b"\x05\x00")
    assert "SHA-256" in found_by_verify(copied_folder)[SHARD]


def test_token_outside_the_vocabulary(copied_folder):
    overwrite(copied_folder / SHARD, 512, b"\xff\xff")
    with pytest.raises(DataError, match=rf"document \d+ \(.*\) at byte 512 of .*{SHARD} holds token id 65535"):
        read_all(copied_folder)
    assert "token id 65535" in found_by_verify(copied_folder)[SHARD]


def test_index_of_another_shard(copied_folder):
    rows = np.load(copied_folder / INDEX)
    rows[[0, 1]] = rows[[1, 0]]
    np.save(copied_folder / INDEX, rows)
    assert "SHA-256" in found_by_verify(copied_folder)[SHARD]
    rows[0, 1] += 2
    np.save(copied_folder / INDEX, rows)
    with pytest.raises(DataError, match=f"{INDEX} does not belong"):
        TokenDataset.open(copied_folder)


def test_index_is_never_unpickled(copied_folder):
    size = (copied_folder / INDEX).stat().st_size
    harmful = pickle.dumps(["x" * (size - 40)])
    (copied_folder / INDEX).write_bytes(harmful[:size].ljust(size, b"."))
    with pytest.raises(DataError, match=f"cannot read index .*{INDEX}"):
        TokenDataset.open(copied_folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"surprise": 1}, "surprise"),
        ({"format_version": 2}, "format_version"),
        ({"num_tokens": 5}, "num_tokens is not the sum"),
        ({"tokenizer": {"file": "../../etc/passwd", "sha256": "0" * 64}}, "tokenizer.file"),
        ({"shards": []}, "shards"),
    ],
)
def test_wrong_manifest(copied_folder, change, message):
    path = copied_folder / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=message):
        Manifest.load(copied_folder)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "not valid JSON"), ('{"kind": 1, "kind": 2}', "occurs twice"), ("[]", "not a valid")]
)
def test_unreadable_manifest(copied_folder, text, message):
    (copied_folder / "dataset.json").write_text(text)
    with pytest.raises(DataError, match=message):
        Manifest.load(copied_folder)


def test_problems_are_all_reported(copied_folder, dataset_folder, tmp_path):
    (copied_folder / SHARD).unlink()
    found = list(problems(DataConfig(train=str(copied_folder), heldout=str(tmp_path / "none")), 10**6, 100))
    assert [where for where, *_ in found] == ["data.train", "data.train", "data.train", "data.heldout"]
    text = " | ".join(" ".join(problem) for problem in found)
    for expected in (SHARD, "vocab_size=100", "samples of 1000000 tokens", "none does not exist",
                     "trainyard data shard"):
        assert expected in text


def test_sets_of_two_tokenizers(copied_folder, dataset_folder):
    path = copied_folder / "dataset.json"
    manifest = json.loads(path.read_text())
    manifest["tokenizer"]["sha256"] = "0" * 64
    path.write_text(json.dumps(manifest))
    [problem] = problems(DataConfig(train=str(dataset_folder), heldout=str(copied_folder)), 64, 400)
    assert "another tokenizer" in problem[1]


def test_verify_checks_the_tokenizer(copied_folder):
    (copied_folder / "tokenizer.model").write_bytes(b"changed")
    assert found_by_verify(copied_folder).keys() == {"tokenizer.model"}


def test_errors_pickle():
    assert pickle.loads(pickle.dumps(DataError("which file"))).message == "which file"
