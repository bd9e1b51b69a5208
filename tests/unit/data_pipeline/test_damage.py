"""A missing, shortened, exchanged or changed file is an error that names it; `verify` finds what opening cannot."""

import json
import os
import pickle

import pytest

from common.errors import DataError, UserError
from data_pipeline.config import DataConfig, problems
from data_pipeline.folder.manifest import Manifest, PairsManifest, load_manifest, signed
from data_pipeline.order import DocumentSpan
from data_pipeline.text.tokenizer import Tokenizer
from data_pipeline.tokens.token_dataset import TokenDataset
from data_pipeline.verify import verify
from tests.unit.data_pipeline.conftest import signed_again, unsigned

SHARD = "shard-000001.tar"
INDEX = "shard-000001.index"


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
    dataset = TokenDataset.open(copied_folder)
    dataset.tokens(0)
    os.truncate(copied_folder / "shard-000000.tar", 512)
    with pytest.raises(DataError, match=r"document 0 at byte 512: shard .*0.tar shrank while .*: it has no byte 512$"):
        dataset.tokens(0)
    with pytest.raises(DataError, match="shrank"):
        dataset.tokens(1)


@pytest.mark.parametrize("offset", [3, 512, 5_000])
def test_a_changed_byte_of_a_shard(copied_folder, offset):
    """In a tar header and in token ids."""
    before = (copied_folder / SHARD).read_bytes()[offset]
    overwrite(copied_folder / SHARD, offset, bytes([before ^ 4]))
    with pytest.raises(DataError, match=rf"document \d+ at byte [\d,]+: bytes [\d,]+ to [\d,]+ of .*{SHARD} "
                                        "do not match their checksum"):
        read_all(copied_folder)
    found = found_by_verify(copied_folder)[SHARD]
    assert "SHA-256" in found and "checksum" in found


def test_a_shard_that_was_written_wrong(copied_folder):
    """Its checksums are those of the wrong bytes."""
    overwrite(copied_folder / SHARD, 512, b"\xff\xff")
    signed_again(copied_folder, SHARD)
    with pytest.raises(DataError, match=rf"document \d+ \(.*\) at byte 512 of .*{SHARD} holds token id 65535"):
        read_all(copied_folder)
    assert "token id 65535" in found_by_verify(copied_folder)[SHARD]
    overwrite(copied_folder / SHARD, 3, b"X")
    signed_again(copied_folder, SHARD)
    assert "not a readable tar file" in found_by_verify(copied_folder)[SHARD]


def test_index_of_another_shard(copied_folder):
    content = bytearray((copied_folder / INDEX).read_bytes())
    content[8] ^= 2  # the number of bytes of the first document
    (copied_folder / INDEX).write_bytes(content)
    assert "SHA-256" in found_by_verify(copied_folder)[SHARD]
    with pytest.raises(DataError, match=rf"index .*{INDEX} is damaged, or belongs to another shard: its SHA-256"):
        TokenDataset.open(copied_folder)
    signed_again(copied_folder, SHARD, rows=bytes(content))
    with pytest.raises(DataError, match=f"{INDEX} does not belong"):
        TokenDataset.open(copied_folder)


def test_index_of_another_length(copied_folder):
    path = copied_folder / "dataset.json"
    content = unsigned(path)
    content["shards"][1]["index_bytes"] += 8
    path.write_text(signed(content))
    with open(copied_folder / INDEX, "ab") as file:
        file.write(bytes(8))
    with pytest.raises(DataError, match="which are not .* rows of 3 numbers"):
        TokenDataset.open(copied_folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"surprise": 1}, "surprise"),
        ({"format_version": "2"}, "format_version"),
        ({"kind": ["tokens"]}, "kind"),
        ({"num_tokens": 5}, "num_tokens is not the sum"),
        ({"tokenizer": {"file": "../../etc/passwd", "sha256": "0" * 64}}, "tokenizer.file"),
        ({"shards": []}, "shards"),
    ],
)
def test_wrong_manifest(copied_folder, change, message):
    path = copied_folder / "dataset.json"
    path.write_text(signed(unsigned(path) | change))
    with pytest.raises(DataError, match=message):
        Manifest.load(copied_folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not valid JSON"), ('{"kind": 1, "kind": 2}', "occurs twice"), ("[]", "not a valid"),
     ("[" * 100_000, "nested too deep"), ('{"kind":' * 100_000, "nested too deep"), ("9" * 5000, "not valid JSON"),
     ("\0", "not valid JSON")],
)
def test_unreadable_manifest(copied_folder, text, message):
    (copied_folder / "dataset.json").write_text(text)
    for read in (Manifest.load, PairsManifest.load, load_manifest, lambda folder: list(verify(folder))):
        with pytest.raises(DataError, match=rf"dataset\.json .*{message}"):
            read(copied_folder)


def test_a_manifest_that_is_no_file(copied_folder):
    (copied_folder / "dataset.json").unlink()
    os.mkfifo(copied_folder / "dataset.json")
    with pytest.raises(DataError, match="not a regular file"):
        load_manifest(copied_folder)


def test_a_folder_of_another_format(copied_folder):
    path = copied_folder / "dataset.json"
    path.write_text(json.dumps(unsigned(path) | {"format_version": 1, "tool_version": "trainyard 0.1.0"}))
    for read in (Manifest.load, load_manifest):
        with pytest.raises(UserError, match=r"written by trainyard 0\.1\.0 in format 1, and this version reads "
                                            "format 2; write it again with `trainyard data shard`"):
            read(copied_folder)


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
    manifest = unsigned(path)
    manifest["tokenizer"]["sha256"] = "0" * 64
    path.write_text(signed(manifest))
    [problem] = problems(DataConfig(train=str(dataset_folder), heldout=str(copied_folder)), 64, 400)
    assert "another tokenizer" in problem[1]


def test_verify_checks_the_tokenizer(copied_folder):
    (copied_folder / "tokenizer.model").write_bytes(b"changed")
    assert found_by_verify(copied_folder).keys() == {"tokenizer.model"}


def test_a_changed_tokenizer_is_not_used(copied_folder, tokenizer):
    """One byte of a piece differs: the model is readable, and its ids mean something else."""
    path = copied_folder / "tokenizer.model"
    path.write_bytes(tokenizer.model.replace(b"gradient", b"gradienu", 1))
    assert Tokenizer.load(path).vocab_size == tokenizer.vocab_size
    with pytest.raises(DataError, match=r"tokenizer\.model was damaged or exchanged"):
        TokenDataset.open(copied_folder).tokenizer  # noqa: B018


def test_verify_in_several_processes(copied_folder):
    overwrite(copied_folder / SHARD, 512, b"\xff" * 9)
    reports = list(verify(copied_folder))
    assert [report.name for report in reports if report.problems] == [SHARD]
    assert list(verify(copied_folder, processes=2)) == reports


def test_errors_pickle():
    assert pickle.loads(pickle.dumps(DataError("which file"))).message == "which file"
