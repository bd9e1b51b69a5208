"""Images with captions: reading a dataset folder of them, and the order in which they are seen.

A pair that cannot be used (no readable image, an empty caption) is replaced by a good one that follows in the order,
the same on every layout; the loader counts them and names the first ones.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.errors import DataError
from data_pipeline.folder.manifest import PairsEntry, PairsManifest
from data_pipeline.folder.shard_index import ShardIndex, read_index
from data_pipeline.folder.shard_reader import DamagedBytes, OpenShards, Shard, require_files
from data_pipeline.image_text.captions import CAPTION_SUFFIXES, BadCaption, read_caption
from data_pipeline.image_text.images import IMAGE_SUFFIXES, BadImage, decode, evaluation_crop, training_crop
from data_pipeline.keyed_permutation import BlockShuffle
from data_pipeline.samples import Fault
from data_pipeline.text.tokenizer import TextTokenizer, Tokenizer

MAX_BAD_IN_A_ROW = 1000
# Neighbours that are read together, some 20 MB of images. Sets of less than 128 blocks are shuffled as a whole.
BLOCK_PAIRS = 256
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

    def __init__(self, folder: Path, manifest: PairsManifest, indexes: Sequence[ShardIndex], image_size: int) -> None:
        self.folder, self.manifest, self.image_size = folder, manifest, image_size
        self.tokenizer = Tokenizer.load_copy(folder / manifest.tokenizer.file, manifest.tokenizer.sha256)
        self._rows = np.concatenate([index.rows for index in indexes])
        self._shards = OpenShards(folder, manifest.shards, [entry.num_pairs for entry in manifest.shards],
                                  [index.checksums for index in indexes])

    @classmethod
    def open(cls, folder: str | os.PathLike, image_size: int = 224) -> "PairsDataset":
        """Open a folder. Raises DataError naming every shard or index that is missing, short or does not belong."""
        folder = Path(folder)
        manifest = PairsManifest.load(folder)
        require_files(folder, manifest)
        return cls(folder, manifest, [load_pairs_index(folder, entry) for entry in manifest.shards], image_size)

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

        Raises BadPair when the tar members are not those that were written, or there is no caption in them; DataError
        when the shard shrank, has gone or cannot be read.
        """
        shard, first = self._shards.shard_of(number)
        try:
            image, caption = _members(shard, self._rows[number].tolist())
        except BadCaption as error:
            raise BadPair(f"{self.place(number)}: {error}") from None
        except DamagedBytes as error:
            raise BadPair(f"pair {number - first} of {shard.path.name}: {error}") from None
        except DataError as error:
            raise DataError(f"pair {number - first} of {shard.path.name}: {error}") from None
        return Pair(image, caption)

    def shard_path(self, number: int) -> Path:
        """The shard that holds a pair."""
        return self._shards.shard_of(number)[0].path

    def place(self, number: int) -> str:
        """Shard and member name of a pair's image, for messages."""
        shard, _ = self._shards.shard_of(number)
        return f"{shard.path}:{shard.name(int(self._rows[number, 0]))}"


class PairSamples:
    """Samples by position: a shuffle of all pairs in every epoch, a pure function of (seed, position).

    A sample is {"pixels": uint8 [3, S, S], "tokens": int64 [sequence_length], "ends": int64 [] (where the end-of-text
    stands), "faults": a `Fault` where the pair that should have stood here cannot be used}.
    """

    weights_shape: tuple[int, ...] = ()

    def __init__(self, dataset: PairsDataset, sequence_length: int, seed: int | None) -> None:
        self.dataset, self.sequence_length, self.seed = dataset, sequence_length, seed
        self.per_epoch = len(dataset)
        self._order = BlockShuffle(self.per_epoch, block=BLOCK_PAIRS, seed=seed, purpose="pairs")

    def sample(self, position: int) -> dict:
        """The pair at `position`, or where it cannot be used, another of the epoch and its fault in "faults".

        The stand-ins of an epoch differ from each other: unusable and good pairs are matched like opening and closing
        brackets. So each good pair is seen once in its own place and at most once more, as long as half of the epoch
        is good. Raises DataError when no good pair follows within the epoch, or within MAX_BAD_IN_A_ROW.
        """
        _, number = self._order.locate(position)
        try:
            return {**self._made(number, position), "faults": []}
        except BadPair as error:
            first = error
        epoch_start = position - position % self.per_epoch
        unmatched, standing_in = 1, None
        for step in range(1, min(self.per_epoch, MAX_BAD_IN_A_ROW)):
            try:
                _, other = self._order.locate(epoch_start + (position + step) % self.per_epoch)
                standing_in = self._made(other, position)
            except BadPair:
                unmatched += 1
                continue
            unmatched -= 1
            if not unmatched:
                break
        if standing_in is None:
            looked_at = min(self.per_epoch, MAX_BAD_IN_A_ROW)
            raise DataError(f"{looked_at} pairs in a row cannot be used, first: {first}")
        return {**standing_in, "faults": [Fault(str(self.dataset.shard_path(number)), str(first))]}

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


def caption_tokens(tokenizer: TextTokenizer, caption: str, length: int) -> tuple[np.ndarray, int]:
    """int64 [length]: the caption, cut so that end-of-text is kept, padded with it; the place of the first one."""
    ids = tokenizer.encode(caption)[: length - 1]
    tokens = np.full(length, tokenizer.end_of_text, dtype=np.int64)
    tokens[: len(ids)] = ids
    return tokens, len(ids)


def load_pairs_index(folder: Path, entry: PairsEntry) -> ShardIndex:
    """Rows are int64 [num_pairs, 4]: offset and length of image and caption. Raises DataError when it does not belong.
    """
    index = read_index(folder, entry, entry.num_pairs, COLUMNS)
    rows = index.rows
    if (rows < 0).any() or (rows[:, 0] + rows[:, 1]).max() > entry.size_bytes \
            or (rows[:, 2] + rows[:, 3]).max() > entry.size_bytes:
        raise DataError(f"index {folder / entry.index} does not belong to shard {entry.name}: offsets lie outside it")
    return index


def _members(shard: Shard, row: list[int]) -> tuple[bytes, str]:
    _, image = shard.member(row[0], row[1], IMAGE_SUFFIXES)
    name, caption = shard.member(row[2], row[3], CAPTION_SUFFIXES)
    return bytes(image), read_caption(bytes(caption), is_json=name.lower().endswith(".json"))
