"""Row G2: single flipped bits in the shards of a dataset, made in place while it is open."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from common.errors import DataError
from data_pipeline.image_text.pair_dataset import PairsDataset
from data_pipeline.image_text.pair_writer import RawPair, write_pairs
from data_pipeline.text.tokenizer import Tokenizer
from data_pipeline.tokens.token_dataset import TokenDataset
from tests.faults.bench import Bench, Trial
from tests.helpers.recipes import write_drawn_dataset

FLIPS = {"tokens": 1000, "images": 500}


def flipped_bits(bench: Bench, trial: Trial) -> None:
    """G2: each flip is found, with the names of sample and shard, or lies where nothing is read.

    Flips in token shards lie anywhere in the file, those of images inside the JPEG members.
    """
    drawn = write_drawn_dataset(trial.folder / "drawn")
    kind = list(FLIPS)[trial.number % len(FLIPS)]
    dataset = TokenDataset.open(drawn / "train") if kind == "tokens" else _pictures(drawn, trial.folder / "pairs")
    path = dataset.folder / dataset.manifest.shards[0].name
    sound, outcomes = contents(dataset), Counter[str]()
    for _ in range(FLIPS[kind]):
        if isinstance(dataset, PairsDataset):
            offset, length = dataset._rows[trial.random.randrange(len(dataset)), :2].tolist()
        else:
            offset, length = 0, path.stat().st_size
        bit = trial.random.randrange(8 * offset, 8 * (offset + length))
        flip(path, bit)
        found = contents(dataset)
        flip(path, bit)
        changed = [content for content, before in zip(found, sound, strict=True) if content != before]
        is_named = all(isinstance(content, str) and path.name in content for content in changed)
        outcomes["harmless" if not changed else "found" if is_named else "silent"] += 1
    trial.facts |= {"kind": kind, **outcomes}
    assert outcomes["silent"] == 0, outcomes
    assert outcomes["found"] > FLIPS[kind] / 2, outcomes
    assert contents(dataset) == sound


def contents(dataset: TokenDataset | PairsDataset) -> list[bytes | str]:
    """What is read of every sample: its bytes, or the message of the error."""
    read = (lambda number: dataset.tokens(number).tobytes()) if isinstance(dataset, TokenDataset) else (
        lambda number: dataset.pair(number).image)
    found: list[bytes | str] = []
    for number in range(len(dataset)):
        try:
            found.append(read(number))
        except DataError as error:
            found.append(error.message)
    return found


def flip(path: Path, bit: int) -> None:
    """Change one bit of a file in place; a second time, it is as it was."""
    with open(path, "r+b") as file:
        file.seek(bit // 8)
        [before] = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([before ^ 1 << bit % 8]))


def _pictures(drawn: Path, folder: Path) -> PairsDataset:
    """Forty JPEGs of noise, about 8 kB each."""
    def picture(number: int) -> bytes:
        written, noise = io.BytesIO(), np.random.default_rng(number).integers(0, 256, (64, 80, 3), dtype=np.uint8)
        Image.fromarray(noise).save(written, "JPEG", quality=95)
        return written.getvalue()

    pairs = (RawPair(str(number), ".jpg", picture(number), f"picture {number}") for number in range(40))
    write_pairs(pairs, Tokenizer.load(drawn / "tokenizer.model"), folder, split="train", inputs="noise")
    return PairsDataset.open(folder)
