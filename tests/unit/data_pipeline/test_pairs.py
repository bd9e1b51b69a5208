"""Image-text shards: what is written is read, bad pairs are replaced and counted, order comes from position."""

import logging
import tarfile
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from common.errors import DataError, UserError
from data_pipeline.batch_plan import BatchPlan
from data_pipeline.image_text.images import decode, evaluation_crop
from data_pipeline.image_text.pair_dataset import PairsDataset, caption_tokens
from data_pipeline.image_text.pair_writer import RawPair, write_pairs
from data_pipeline.loader import Loader, ReadOptions, heldout_batches
from data_pipeline.samples import Fault
from data_pipeline.tokens.token_dataset import TokenDataset
from data_pipeline.unusable import Unusable, is_too_many, told
from tests.unit.data_pipeline.test_images import bomb_header, encoded

LENGTH, SIZE = 8, 16
BAD = {3: b"not an image", 4: bomb_header(60_000, 60_000), 11: None}  # None: an empty caption


def good(number: int) -> RawPair:
    suffix, kind = ((".png", "PNG"), (".jpg", "JPEG"), (".webp", "WEBP"), (".jpeg", "JPEG"))[number % 4]
    image = Image.new("RGB", (20, 24), (number * 5 % 256, 100, 200))
    return RawPair(f"photo {number}", suffix, encoded(image, kind), f"return {number} of the class")


def pair(number: int) -> RawPair:
    if number not in BAD:
        return good(number)
    content = BAD[number]
    return RawPair(f"bad {number}", ".png", good(0).image, "  \n") if content is None else \
        RawPair(f"bad {number}", ".png", content, "a caption")


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs") / "train"
    manifest, is_reused = write_pairs(map(pair, range(40)), tokenizer, folder, split="train", inputs="40 pairs",
                                      shard_bytes=3000)
    assert len(manifest.shards) > 2
    assert (manifest.num_pairs, is_reused) == (40, False)
    return folder


@pytest.fixture(scope="module")
def dataset(folder):
    return PairsDataset.open(folder, SIZE)


def steps(dataset, count, workers=0, rank=0, ranks=1, start=0, micro=4):
    plan = BatchPlan(seed=5, global_batch=8, micro_batch=micro, data_rank=rank, data_ranks=ranks, first_position=start)
    with Loader(dataset, plan, ReadOptions(LENGTH, workers=workers)) as loader:
        return [next(loader) for _ in range(count)], loader


def joined(found):
    return {name: np.concatenate([np.asarray(batch[name]) for step in found for batch in step]) for name in found[0][0]}


def test_what_is_written_is_read(dataset):
    assert len(dataset) == 40
    for number in (0, 1, 2, 7, 39):
        stored, caption = dataset.pair(number)
        assert stored == good(number).image
        assert caption == good(number).caption


def test_shards_are_plain_webdataset(folder):
    with tarfile.open(folder / "shard-000000.tar") as archive:
        suffixes = {name.partition(".")[2] for name in archive.getnames()}
    assert suffixes <= {"png", "jpg", "image.webp", "txt"}


def test_batches(dataset):
    found, loader = steps(dataset, 1)
    assert [sorted(batch) for batch in found[0]] == [["ends", "pixels", "tokens"]] * 2
    batch = found[0][0]
    assert batch["pixels"].shape == (4, 3, SIZE, SIZE)
    assert batch["tokens"].shape == (4, LENGTH)
    assert (batch["tokens"].gather(1, batch["ends"][:, None]) == dataset.tokenizer.end_of_text).all()
    assert loader.position == 8


@pytest.mark.slow
def test_order_is_a_function_of_position(dataset):
    whole = joined(steps(dataset, 7)[0])  # crosses an epoch
    for kwargs in ({"workers": 2}, {"micro": 2}):
        other = joined(steps(dataset, 7, **kwargs)[0])
        assert all(np.array_equal(whole[name], other[name]) for name in whole)
    late = joined(steps(dataset, 4, start=24)[0])
    assert all(np.array_equal(whole[name][24:], late[name]) for name in whole)
    parts = [joined(steps(dataset, 7, rank=rank, ranks=2)[0]) for rank in (0, 1)]
    shared = np.stack([part["tokens"].reshape(7, 4, LENGTH) for part in parts], axis=1).reshape(-1, LENGTH)
    assert np.array_equal(shared, whole["tokens"])


def test_an_epoch_holds_every_good_pair(dataset):
    samples = dataset.samples(LENGTH, 5)
    captions = {tuple(samples.sample(position)["tokens"]) for position in range(40)}
    assert captions == {tuple(caption_tokens(dataset.tokenizer, good(n).caption, LENGTH)[0])
                        for n in range(40) if n not in BAD}


def test_bad_pairs_are_counted_named_and_replaced_by_the_next(dataset, caplog):
    samples = dataset.samples(LENGTH, 5)
    order = [samples._order.locate(position)[1] for position in range(samples.per_epoch)]
    place = order.index(11)
    assert np.array_equal(samples.sample(place)["tokens"], samples.sample(place + 1)["tokens"])
    [fault] = samples.sample(place)["faults"]
    assert "empty" in fault.message and fault.shard in fault.message
    with caplog.at_level(logging.WARNING):
        _, loader = steps(dataset, 5)
    assert (loader.unusable.num, loader.position) == (3, 40)
    logged = " ".join(record.getMessage() for record in caplog.records)
    assert all(words in logged for words in ("cannot be decoded", "pixels", "empty"))
    assert "shard-" in logged
    in_all = told([loader.unusable.report()])
    assert f"{fault.shard} (1)" in in_all and "Some: " in in_all


@pytest.mark.slow
def test_counts_depend_on_the_position_alone(dataset):
    """After any step the sum over ranks is the same, however many ranks and workers there are and wherever they began.
    """
    def after(num_steps, ranks, **options):
        return sum(steps(dataset, num_steps, rank=rank, ranks=ranks, **options)[1].unusable.num
                   for rank in range(ranks))

    alone = [after(num_steps, 1) for num_steps in range(1, 12)]
    assert alone[4] == 3 and alone[9] == 6  # an epoch is five steps
    assert [after(num_steps, 2) for num_steps in range(1, 12)] == alone
    assert [after(num_steps, 4, micro=1) for num_steps in (3, 7, 11)] == [alone[2], alone[6], alone[10]]
    assert after(4, 2, start=7 * 8) == alone[10] - alone[6]
    assert after(7, 1, workers=2) == alone[6]


def test_stand_ins_of_an_epoch_differ(tokenizer, tmp_path):
    """Of 60 pairs with 20 bad ones, many in a row: each good pair is seen once or twice, never more."""
    bad = {*range(3, 9), *range(20, 30), 40, 57, 58, 59}
    pairs = [RawPair(str(n), ".png", b"broken" if n in bad else good(n).image, f"return {n}") for n in range(60)]
    write_pairs(pairs, tokenizer, tmp_path / "bad", split="train", inputs="x")
    dataset = PairsDataset.open(tmp_path / "bad", SIZE)
    for seed in (None, 5, 6):
        samples = dataset.samples(LENGTH, seed)
        seen = Counter(tuple(samples.sample(position)["tokens"]) for position in range(60))
        assert sum(seen.values()) == 60
        assert sorted(seen.values()) == [1] * 20 + [2] * 20


@pytest.mark.parametrize(("unusable", "samples", "fraction", "expected"), [
    (0, 10, 0.0, False), (1, 1_000_000, 0.0, True),  # 0 is 0
    (10, 10, 0.01, False), (11, 1_000, 0.01, True), (11, 1_100, 0.01, False), (12, 1_100, 0.01, True),
    (11, 11, 1.0, False),
])  # fmt: skip
def test_how_many_are_too_many(unusable, samples, fraction, expected):
    assert is_too_many(unusable, samples, fraction) is expected


def test_worst_shards_are_told_first():
    reports = []
    for rank in range(2):
        unusable = Unusable()
        unusable.note(Fault(f"shard-{n}", f"pair {n} of rank {rank}") for n in range(7) for _ in range(1 + n))
        reports.append(unusable.report())
    assert "shard-6 (14), shard-5 (12), shard-4 (10), shard-3 (8), shard-2 (6) and 2 more. Some: " in told(reports)


def test_only_bad_pairs_is_an_error(tokenizer, tmp_path):
    pairs = [RawPair(str(n), ".png", b"broken", "words") for n in range(6)]
    write_pairs(pairs, tokenizer, tmp_path / "bad", split="train", inputs="x")
    with pytest.raises(DataError, match="6 pairs in a row"):
        PairsDataset.open(tmp_path / "bad", SIZE).samples(LENGTH, 5).sample(0)


def test_heldout_is_in_order_and_weighted(dataset):
    """Pairs 3 and 4 cannot be used, and the last three rows are padding."""
    unusable = Unusable()
    found = [list(heldout_batches(dataset, BatchPlan.heldout(2, rank, 2), ReadOptions(LENGTH), 5, unusable=unusable))
             for rank in (0, 1)]
    assert [len(batches) for batches in found] == [2, 2]
    weights = [np.asarray(batch["weights"]).tolist() for turn in zip(*found, strict=True) for batch in turn]
    assert weights == [[1, 1], [1, 0], [0, 0], [0, 0]]
    assert unusable.num == 2
    first = np.asarray(found[0][0]["pixels"][0])
    assert np.array_equal(first, evaluation_crop(decode(good(0).image), SIZE))


@pytest.mark.parametrize(("ranks", "micro"), [(1, 3), (2, 2), (3, 1)])
def test_each_usable_heldout_pair_counts_once(dataset, ranks, micro):
    seen, unusable = Counter(), Unusable()
    for rank in range(ranks):
        for batch in heldout_batches(dataset, BatchPlan.heldout(micro, rank, ranks), ReadOptions(LENGTH),
                                     unusable=unusable):
            for tokens, weight in zip(batch["tokens"].tolist(), batch["weights"].tolist(), strict=True):
                seen[tuple(tokens)] += weight
    expected = Counter(tuple(caption_tokens(dataset.tokenizer, good(n).caption, LENGTH)[0].tolist())
                       for n in range(40) if n not in BAD)
    assert +seen == expected
    assert unusable.num == len(BAD)


def test_end_of_text_is_kept_in_a_long_caption(tokenizer):
    tokens, end = caption_tokens(tokenizer, "return the class of token " * 20, LENGTH)
    assert (end, tokens[-1]) == (LENGTH - 1, tokenizer.end_of_text)
    assert tokens[0] != tokenizer.end_of_text


def test_reused_or_in_the_way(folder, tokenizer, dataset_folder):
    assert write_pairs([], tokenizer, folder, split="train", inputs="40 pairs", shard_bytes=3000)[1]
    with pytest.raises(UserError, match="other input"):
        write_pairs([], tokenizer, folder, split="train", inputs="41 pairs")
    with pytest.raises(UserError, match="images with captions"):
        TokenDataset.open(folder)
    with pytest.raises(UserError, match="tokenized documents"):
        PairsDataset.open(dataset_folder)


def test_nothing_to_write(tokenizer, tmp_path):
    with pytest.raises(UserError, match="no pair"):
        write_pairs([], tokenizer, tmp_path / "none", split="train", inputs="x")
    assert not (tmp_path / "none").exists()


def test_damaged_shard_is_named(folder, tmp_path):
    import shutil

    copy = shutil.copytree(folder, tmp_path / "copy")
    path = copy / "shard-000001.tar"
    path.write_bytes(path.read_bytes()[:-512])
    with pytest.raises(DataError, match=r"shard-000001\.tar"):
        PairsDataset.open(copy)


def test_verify_and_stats(folder, tmp_path, capsys):
    """Unusable pairs are counted and named; a changed shard is damage, with exit code 65."""
    import shutil

    from tests.unit.data_pipeline.test_command import trainyard

    assert trainyard("verify", folder, "--max-bad-fraction", 0.1) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "3 of 40 pairs cannot be used" in told
    assert "│ shard-000000.tar │ 2 │" in told
    assert all(words in told for words in ("cannot be decoded", "pixels", "the caption is empty"))
    assert trainyard("verify", folder) == 65
    assert "more than the part 0.01" in capsys.readouterr().out
    assert trainyard("stats", folder) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "37 of the first 40" in told
    assert "20 least, 20 median, 20 most" in told
    copy = shutil.copytree(folder, tmp_path / "copy")
    path = copy / "shard-000001.tar"
    content = bytearray(path.read_bytes())
    content[2000] ^= 1
    path.write_bytes(content)
    assert trainyard("verify", copy) == 65
    assert "SHA-256 of shard-000001.tar" in " ".join(capsys.readouterr().out.split())
