"""What happens to the files under an open dataset: nothing but what was written is ever handed out."""

import errno
import io
import logging
import os
import random
import shutil
import zlib
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image

from common.errors import DataError, UserError
from data_pipeline.folder import retries, shard_reader
from data_pipeline.folder.manifest import Manifest
from data_pipeline.folder.shard_index import BlockChecksums, read_index
from data_pipeline.image_text.pair_dataset import BadPair, PairsDataset
from data_pipeline.image_text.pair_writer import RawPair, write_pairs
from data_pipeline.order import DocumentSpan
from data_pipeline.tokens.token_dataset import TokenDataset

FIRST = "shard-000000.tar"


@pytest.fixture(scope="module")
def pairs_folder(tokenizer, tmp_path_factory):
    """Pictures of noise, about 8 kB each, in one shard."""
    def picture(number):
        written = io.BytesIO()
        noise = np.random.default_rng(number).integers(0, 256, (64, 80, 3), dtype=np.uint8)
        Image.fromarray(noise).save(written, "JPEG", quality=95)
        return written.getvalue()

    folder = tmp_path_factory.mktemp("pairs") / "train"
    write_pairs([RawPair(str(n), ".jpg", picture(n), f"return {n} of the class") for n in range(30)], tokenizer, folder,
                split="train", inputs="noise")
    return folder


@pytest.fixture
def quick_retries(monkeypatch):
    monkeypatch.setattr(retries, "WAITS", (0, 0))


def documents(folder):
    dataset = TokenDataset.open(folder)
    return dataset, [dataset.tokens(number).tolist() for number in range(len(dataset))]


def flipped(path, bit):
    """Flip a bit of a file in place; called again, it flips it back."""
    with open(path, "r+b") as file:
        file.seek(bit // 8)
        [before] = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([before ^ 1 << bit % 8]))


def test_checksums_of_blocks():
    """However the stream is cut; the last block may be short, or just full."""
    content = bytes(range(256)) * 9
    for length in (0, 1, 511, 512, 513, 1024, 2304):
        checksums = BlockChecksums(512)
        for begin in range(0, length, 100):
            checksums.update(content[begin : min(begin + 100, length)])
        assert checksums.values == [zlib.crc32(content[b : min(b + 512, length)]) for b in range(0, length, 512)]


def test_no_flipped_bit_of_a_token_shard_is_silent(copied_folder):
    """Found, or where nothing was read: then the ids are those that were written."""
    chance = random.Random(7)
    dataset, sound = documents(copied_folder)
    names = [entry.name for entry in dataset.manifest.shards]
    num_found = 0
    for _ in range(60):
        path = copied_folder / chance.choice(names)
        bit = chance.randrange(8 * path.stat().st_size)
        flipped(path, bit)
        try:
            assert [dataset.tokens(number).tolist() for number in range(len(dataset))] == sound, (path, bit)
        except DataError as error:
            num_found += 1
            assert path.name in error.message and "document" in error.message
        flipped(path, bit)
    assert num_found > 30


def test_no_flipped_bit_of_an_image_is_silent(pairs_folder, tmp_path):
    chance = random.Random(8)
    folder = shutil.copytree(pairs_folder, tmp_path / "copy")
    dataset = PairsDataset.open(folder)
    for _ in range(60):
        number = chance.randrange(len(dataset))
        offset, length = dataset._rows[number, :2].tolist()
        bit = chance.randrange(8 * offset, 8 * (offset + length))
        flipped(folder / FIRST, bit)
        with pytest.raises(BadPair, match=f"pair {number} of {FIRST}: bytes .* do not match their checksum"):
            dataset.pair(number)
        flipped(folder / FIRST, bit)
        dataset.pair(number)


def test_no_flipped_bit_of_an_index_is_silent(copied_folder):
    chance = random.Random(9)
    path = copied_folder / "shard-000000.index"
    for _ in range(60):
        bit = chance.randrange(8 * path.stat().st_size)
        flipped(path, bit)
        with pytest.raises(DataError, match=rf"index .*{path.name} is damaged"):
            TokenDataset.open(copied_folder)
        flipped(path, bit)


def without_payload(folder, path):
    """The shard with all its token ids 0 and its tar headers as they are."""
    content = bytearray(path.read_bytes())
    [entry] = [entry for entry in Manifest.load(folder).shards if entry.name == path.name]
    for offset, length, _ in read_index(folder, entry, entry.num_documents, 3).rows.tolist():
        content[offset : offset + length] = bytes(length)
    return bytes(content)


def test_no_flipped_bit_of_a_manifest_is_silent(copied_folder):
    """A bit may be harmless: that which makes a letter of `kind` or of a hash's digits another is not."""
    chance = random.Random(10)
    path = copied_folder / "dataset.json"
    sound = Manifest.load(copied_folder)
    for _ in range(300):
        bit = chance.randrange(8 * path.stat().st_size)
        flipped(path, bit)
        with suppress(DataError, UserError):
            assert Manifest.load(copied_folder) == sound  # the bit made white space of another kind
        flipped(path, bit)


@pytest.mark.parametrize("change", [
    lambda folder, path: bytes(path.stat().st_size),
    without_payload,
    lambda folder, path: path.read_bytes()[10240:] + path.read_bytes()[:10240],
])  # fmt: skip
def test_a_shard_overwritten_in_place_while_it_is_open(copied_folder, change):
    """Also in a document that was read before, and with the time of change set back."""
    path = copied_folder / FIRST
    dataset = TokenDataset.open(copied_folder)
    dataset.tokens(0)
    before = path.stat()
    path.write_bytes(change(copied_folder, path))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(DataError, match=rf"document 0 at byte 512: bytes 0 to [\d,]+ of .*{FIRST}"):
        dataset.window([DocumentSpan(0, 0, 3)])


def test_a_shard_replaced_or_removed_while_it_is_open(copied_folder, monkeypatch):
    """The open file is read on; what has to be opened again is not taken for it."""
    monkeypatch.setattr(shard_reader, "MAX_OPEN_SHARDS", 1)
    dataset, sound = documents(copied_folder)
    dataset.tokens(0)
    path = copied_folder / FIRST
    aside = copied_folder / "aside"
    aside.write_bytes(bytes(path.stat().st_size))
    aside.rename(path)
    assert dataset.tokens(0).tolist() == sound[0]
    dataset.tokens(len(dataset) - 1)
    with pytest.raises(DataError, match=rf"document 0 at byte 512: .*{FIRST} do not match their checksum"):
        dataset.tokens(0)
    path.write_bytes(b"short")
    dataset.tokens(len(dataset) - 1)
    with pytest.raises(DataError, match=rf"document 0 .*{FIRST} has 5 bytes where the manifest says"):
        dataset.tokens(0)
    path.unlink()
    with pytest.raises(DataError, match=rf"cannot read shard .*{FIRST}: No such file"):
        dataset.tokens(0)


def test_open_files_are_bounded(copied_folder, monkeypatch):
    monkeypatch.setattr(shard_reader, "MAX_OPEN_SHARDS", 2)
    before = len(os.listdir("/proc/self/fd"))
    dataset, sound = documents(copied_folder)
    assert len(dataset.manifest.shards) == 3
    assert len(os.listdir("/proc/self/fd")) == before + 2
    assert [dataset.tokens(number).tolist() for number in range(len(dataset))] == sound
    del dataset
    assert len(os.listdir("/proc/self/fd")) == before


def failing(times, code):
    """An os.pread that fails so often, and then reads."""
    left, real = [code] * times, os.pread

    def pread(file, length, offset):
        if left:
            raise OSError(left.pop(), os.strerror(code))
        return real(file, length, offset)

    return pread


@pytest.mark.parametrize("code", retries.TRANSIENT)
def test_a_read_that_fails_for_a_moment(copied_folder, monkeypatch, quick_retries, caplog, code):
    dataset, sound = documents(copied_folder)
    monkeypatch.setattr(os, "pread", failing(2, code))
    with caplog.at_level(logging.WARNING):
        assert dataset.tokens(0).tolist() == sound[0]
    assert [os.strerror(code) in record.getMessage() for record in caplog.records] == [True, True]
    assert FIRST in caplog.text


@pytest.mark.parametrize(("code", "tried"), [(errno.EIO, r" \(tried 3 times\)"), (errno.EACCES, "$")])
def test_a_read_that_keeps_failing(copied_folder, pairs_folder, monkeypatch, quick_retries, code, tried):
    """The storage fails, not one sample: a pair is not passed over either."""
    tokens, pairs = TokenDataset.open(copied_folder), PairsDataset.open(pairs_folder)
    monkeypatch.setattr(os, "pread", failing(99, code))
    message = rf"0.*: cannot read shard .*{FIRST} at byte 0: {os.strerror(code)}{tried}"
    with pytest.raises(DataError, match=f"document {message}"):
        tokens.tokens(0)
    with pytest.raises(DataError, match=f"pair {message}") as found:
        pairs.pair(0)
    assert not isinstance(found.value, BadPair)


def test_a_read_that_comes_in_parts(copied_folder, monkeypatch):
    dataset, sound = documents(copied_folder)
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda file, length, offset: real(file, min(length, 1000), offset))
    assert [dataset.tokens(number).tolist() for number in range(len(dataset))] == sound
