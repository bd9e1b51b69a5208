"""Images with captions: reading a dataset folder of them, and the order in which they are seen.

A pair that cannot be used (no readable image, an empty caption) is replaced by the next good one of the order, the same
on every layout; the loader counts them and names the first ones.
"""

import os
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.errors import DataError
from data_pipeline.folder.manifest import PairsEntry, PairsManifest
from data_pipeline.folder.shard_reader import MappedShards, read_index, require_files
from data_pipeline.image_text.captions import CAPTION_SUFFIXES, caption_of
from data_pipeline.image_text.images import IMAGE_SUFFIXES, BadImage, decode, evaluation_crop, training_crop
from data_pipeline.order import MAX_CACHED_EPOCHS, permutation
from data_pipeline.text.tokenizer import TextTokenizer, Tokenizer

MAX_BAD_IN_A_ROW = 1000
COLUMNS = 4  # image offset, image bytes, caption offset, caption bytes


class BadPair(DataError):
    """A pair that cannot be used; the message says which one and why."""


class Pair(NamedTuple):
    """What is stored of one sample."""

    image: bytes
    caption: str


class PairsDataset:
    """A finished folder of image-text shards, open for reading. Pickles as its folder name.

    Args of `open`: the folder, and the height and width of the images that samples hold.
    """

    def __init__(self, folder: Path, manifest: PairsManifest, rows: np.ndarray, image_size: int) -> None:
        self.folder, self.manifest, self.image_size = folder, manifest, image_size
        self.tokenizer = Tokenizer.load_copy(folder / manifest.tokenizer.file)
        self._rows = rows
        self._shards = MappedShards(folder, manifest.shards, [entry.num_pairs for entry in manifest.shards])

    @classmethod
    def open(cls, folder: str | os.PathLike, image_size: int = 224) -> "PairsDataset":
        """Open a folder. Raises DataError naming every shard or index that is missing, short or does not belong."""
        folder = Path(folder)
        manifest = PairsManifest.load(folder)
        require_files(folder, manifest)
        rows = np.concatenate([_load_index(folder, entry) for entry in manifest.shards])
        return cls(folder, manifest, rows, image_size)

    def __reduce__(self) -> tuple:
        return PairsDataset.open, (str(self.folder), self.image_size)

    def __len__(self) -> int:
        """Number of pairs, good and bad."""
        return len(self._rows)

    def samples(self, sequence_length: int, seed: int | None) -> "PairSamples":
        """The samples by position, captions cut to `sequence_length` tokens; seed None: stored order, centre crops."""
        return PairSamples(self, sequence_length, seed)

    def pair(self, number: int) -> Pair:
        """The stored image and its caption.

        Raises BadPair when the tar members are not what the index says, or the caption holds no text.
        """
        shard, first = self._shards.shard_of(number)
        parts = []
        row = self._rows[number].tolist()
        for offset, length_bytes, suffixes in ((*row[:2], IMAGE_SUFFIXES), (*row[2:], CAPTION_SUFFIXES)):
            fault = shard.member_fault(offset, length_bytes, suffixes)
            if fault:
                raise BadPair(f"pair {number - first} of {shard.path}: {fault}")
            parts.append(shard.content(offset, length_bytes))
        caption = caption_of(parts[1], is_json=shard.name(row[2]).lower().endswith(".json"))
        if not caption:
            raise BadPair(f"{self.place(number)}: the caption is empty or no text")
        return Pair(parts[0], caption)

    def place(self, number: int) -> str:
        """Shard and member name of a pair's image, for messages."""
        shard, _ = self._shards.shard_of(number)
        return f"{shard.path}:{shard.name(int(self._rows[number, 0]))}"


class PairSamples:
    """Samples by position: a shuffle of all pairs in every epoch, a pure function of (seed, position).

    A sample is {"pixels": uint8 [3, S, S], "tokens": int64 [sequence_length], "ends": int64 [] (where the end-of-text
    stands), "faults": what is wrong with the pair that should have stood here, if anything}.
    """

    weights_shape: tuple[int, ...] = ()

    def __init__(self, dataset: PairsDataset, sequence_length: int, seed: int | None) -> None:
        self.dataset, self.sequence_length, self.seed = dataset, sequence_length, seed
        self.per_epoch = len(dataset)
        self._orders: OrderedDict[int, np.ndarray] = OrderedDict()

    def sample(self, position: int) -> dict:
        """Raises DataError when no good pair follows within the epoch, or within MAX_BAD_IN_A_ROW."""
        epoch, turn = divmod(position, self.per_epoch)
        order = self._order(epoch)
        faults: list[str] = []
        for step in range(min(self.per_epoch, MAX_BAD_IN_A_ROW)):
            number = int(order[(turn + step) % self.per_epoch])
            try:
                return {**self._made(number, position), "faults": faults[:1]}  # the others have positions of their own
            except BadPair as error:
                faults.append(str(error))
        raise DataError(f"{len(faults)} pairs in a row cannot be used, first: {faults[0]}")

    def _made(self, number: int, position: int) -> dict:
        pair = self.dataset.pair(number)
        size = self.dataset.image_size
        try:
            image = decode(pair.image, crop_size=None if self.seed is None else size)
        except BadImage as error:
            raise BadPair(f"{self.dataset.place(number)}: {error}") from None
        if self.seed is None:
            pixels = evaluation_crop(image, size)
        else:
            pixels = training_crop(image, size, f"{self.seed}/{position}/crop")
        tokens, end = caption_tokens(self.dataset.tokenizer, pair.caption, self.sequence_length)
        return {"pixels": pixels, "tokens": tokens, "ends": np.array(end)}

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            self._orders[epoch] = permutation(self.per_epoch, self.seed, epoch, "pairs")
            while len(self._orders) > MAX_CACHED_EPOCHS:
                self._orders.popitem(last=False)
        return self._orders[epoch]


def caption_tokens(tokenizer: TextTokenizer, caption: str, length: int) -> tuple[np.ndarray, int]:
    """int64 [length]: the caption, cut so that end-of-text is kept, padded with it; the place of the first one."""
    ids = tokenizer.encode(caption)[: length - 1]
    tokens = np.full(length, tokenizer.end_of_text, dtype=np.int64)
    tokens[: len(ids)] = ids
    return tokens, len(ids)


def _load_index(folder: Path, entry: PairsEntry) -> np.ndarray:
    """int64 [num_pairs, 4]: offset and length of image and caption. Raises DataError when it does not belong."""
    rows = read_index(folder, entry, entry.num_pairs, COLUMNS)
    if (rows < 0).any() or (rows[:, 0] + rows[:, 1]).max() > entry.size_bytes \
            or (rows[:, 2] + rows[:, 3]).max() > entry.size_bytes:
        raise DataError(f"index {folder / entry.index} does not belong to shard {entry.name}: offsets lie outside it")
    return rows
