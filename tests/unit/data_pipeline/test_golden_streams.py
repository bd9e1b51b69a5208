"""Golden values of the sample streams: where they change, a run that is resumed no longer goes on with its samples.

Text and captions are read with a tokenizer of bytes, so that the values depend on no library's version.
"""

import hashlib
import io

import numpy as np
import pytest
from PIL import Image

from data_pipeline.batch_plan import BatchPlan
from data_pipeline.corruption.bart_denoising import Denoising
from data_pipeline.corruption.masked_tokens import Masking, SegmentPairs
from data_pipeline.corruption.noise_seed import HELDOUT, NoiseSeed
from data_pipeline.corruption.span_corruption import FillInTheMiddle, PrefixCut, PrefixSplit, SpanCorruption
from data_pipeline.corruption.special_ids import SpecialIds, raw_tokens
from data_pipeline.image_text.pair_dataset import PairsDataset
from data_pipeline.image_text.pair_writer import RawPair, write_pairs
from data_pipeline.loader import Loader, ReadOptions, each, heldout_batches
from data_pipeline.text.token_pieces import sentence_ends, word_starts
from data_pipeline.tokens.in_memory_dataset import TextDataset

LENGTH, SPECIAL, END = 32, SpecialIds.at_top(300), 256


class ByteTokenizer:
    """A token for each byte, and end-of-text."""

    vocab_size, end_of_text, sha256 = 257, END, ""

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(token for token in ids if token < END).decode()

    def pieces(self):
        return [chr(byte) for byte in range(256)] + ["</s>"]


TEXTS = [f"Document {number} says: {' '.join(str(number * k) for k in range(1, 4 + number % 9))}. Is it long? No."
         for number in range(40)]
DATASET = TextDataset(TEXTS, ByteTokenizer())


def masking(seed, starts=None, pairs=None):
    return Masking(seed, LENGTH, 5, SPECIAL, vocab_size=257, masked_part=0.8, random_part=0.1, starts=starts,
                   pairs=pairs)


STAGES = {
    "tokens": None,
    "span corruption": lambda seed: SpanCorruption(seed, raw_tokens(29, 0.15, 3.0), 12, SPECIAL, end_of_text=END),
    "prefix cut": PrefixCut,
    "prefix split": lambda seed: PrefixSplit(seed, LENGTH, 32, 32, special=SPECIAL),
    "fill in the middle": lambda seed: FillInTheMiddle(seed, 0.5, 0.5, SPECIAL, end_of_text=END),
    "denoising": lambda seed: Denoising(
        seed, LENGTH, 34, 34, special=SPECIAL, end_of_text=END, is_end=sentence_ends(ByteTokenizer()),
        infill_ratio=0.3, mean_span=3.0, mask_ratio=0.1, delete_ratio=0.1, rotate_rate=0.5),
    "masked tokens": masking,
    "masked words": lambda seed: masking(seed, starts=word_starts(ByteTokenizer())),
    "segment pairs": lambda seed: masking(seed, pairs=SegmentPairs(DATASET, LENGTH, seed)),
}
GOLDEN = {
    "tokens": ("fc85d0962c6ad931", "9b5cea05ca957e39"),
    "span corruption": ("f9fc3e4c823b0e6e", "187d7353b7a22693"),
    "prefix cut": ("bf7288126eb0699b", "f23df8bc37236f1b"),
    "prefix split": ("8200cafe4b650235", "c388ade708fa9577"),
    "fill in the middle": ("2f2acd37a618d476", "18111a474f348772"),
    "denoising": ("77fb2814012e173c", "81789f95d5eb46e2"),
    "masked tokens": ("f3204907d810554c", "075fea13c960c8ae"),
    "masked words": ("373b95a50318d78d", "afd8178426240724"),
    "segment pairs": ("a10d4957bade4e7c", "d1d3325ce0ce3928"),
    "pairs": "31c87e774c108707",
    "crops": [114.0, 125.0, 126.0, 115.0, 114.0, 110.0],
}


def digest(batches):
    """SHA-256 of names, types, shapes and content."""
    found = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            array = np.ascontiguousarray(batch[name].numpy())
            found.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return found.hexdigest()[:16]


def train_batches(dataset, stages):
    """Six steps of data rank 1 of 2 from position 24 on; they cross an epoch."""
    plan = BatchPlan(seed=1234, global_batch=24, micro_batch=3, data_rank=1, data_ranks=2, first_position=24)
    with Loader(dataset, plan, ReadOptions(LENGTH, stages=stages)) as loader:
        return [batch for _ in range(6) for batch in next(loader)]


@pytest.mark.parametrize("name", STAGES)
def test_text(name):
    stage = STAGES[name]
    train = train_batches(DATASET, [each(stage(NoiseSeed(1234)))] if stage else [])
    read = ReadOptions(LENGTH, stages=[each(stage(HELDOUT))] if stage else [])
    heldout = heldout_batches(DATASET, BatchPlan.heldout(2, 1, 2), read, num_samples=13)
    assert (digest(train), digest(heldout)) == GOLDEN[name]


def test_pairs(tokenizer, tmp_path):
    """Blue is the number of a pair, so it tells the order; red and green are coordinates, so they tell the crop."""
    dataset = PairsDataset.open(written_pairs(tokenizer, tmp_path / "pairs"), 8)
    dataset.tokenizer = ByteTokenizer()
    batches = train_batches(dataset, [])
    pixels = batches[0]["pixels"].float()
    order = [{**batch, "pixels": batch["pixels"][:, 2]} for batch in batches]
    assert digest(order) == GOLDEN["pairs"]
    assert pixels[:, :2].mean(dim=(2, 3)).flatten().tolist() == pytest.approx(GOLDEN["crops"], abs=1)


def written_pairs(tokenizer, folder):
    def content(number):
        written = io.BytesIO()
        y, x = np.mgrid[:24, :20].astype(np.uint8)
        Image.fromarray(np.stack([12 * x, 10 * y, np.full_like(x, number)], axis=-1)).save(written, "PNG")
        return written.getvalue()

    pairs = [RawPair(str(number), ".png", content(number), f"caption {number}") for number in range(40)]
    write_pairs(pairs, tokenizer, folder, split="train", inputs="golden")
    return folder
