"""Writing a folder of image-text shards: images as they are, captions as text, indexes, a manifest."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from common.errors import TrainyardError, UserError
from common.files import is_empty_folder, write_file, write_folder_aside, writing
from data_pipeline.folder.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    TOKENIZER_FILE,
    PairsEntry,
    PairsManifest,
    TokenizerEntry,
)
from data_pipeline.folder.shard_index import PAIR_BLOCK_BYTES
from data_pipeline.folder.shard_writer import (
    DEFAULT_SHARD_BYTES,
    ShardWriter,
    member_key,
    tool_version,
)
from data_pipeline.text.tokenizer import Tokenizer


class RawPair(NamedTuple):
    """An image file and its caption; `key` says where they come from, `suffix` the kind of image (".png")."""

    key: str
    suffix: str
    image: bytes
    caption: str


def write_pairs(pairs: Iterable[RawPair], tokenizer: Tokenizer, folder: str | os.PathLike, *, split: str,
                inputs: str, shard_bytes: int = DEFAULT_SHARD_BYTES) -> tuple[PairsManifest, bool]:
    """Write pairs into `folder`, or reuse it when its manifest names the same `inputs`. Returns (manifest, is reused).

    Args:
        pairs: what to write, in order.
        tokenizer: its model is copied into the folder.
        folder: made by this call; its parent too.
        split: name recorded in the manifest.
        inputs: text that identifies the content; its hash is recorded in the manifest.
        shard_bytes: bytes of images and captions after which a new shard is begun.

    Raises UserError when there is nothing to write or the folder holds something else, StorageError when the disk
    refuses.
    """
    folder = Path(folder)
    settings = f"{FORMAT_VERSION}/{tokenizer.sha256}/{shard_bytes}/{split}/{inputs}"
    fingerprint = hashlib.sha256(settings.encode()).hexdigest()
    if folder.exists() and not is_empty_folder(folder):
        try:
            manifest = PairsManifest.load(folder)
        except TrainyardError as error:
            raise type(error)(f"{folder} is in the way: {error}; choose another folder or remove that one") from None
        if manifest.inputs_sha256 != fingerprint:
            raise UserError(f"{folder} holds pairs made from other input or settings; choose another folder or "
                            "remove that one")
        return manifest, True
    with writing(folder), write_folder_aside(folder) as aside:
        entries = list(_shards(pairs, aside, shard_bytes))
        if not entries:
            raise UserError(f"there is no pair of image and caption for split {split!r}")
        write_file(aside / TOKENIZER_FILE, tokenizer.model)
        manifest = PairsManifest(
            split=split, num_pairs=sum(entry.num_pairs for entry in entries), vocab_size=tokenizer.vocab_size,
            end_of_text=tokenizer.end_of_text,
            tokenizer=TokenizerEntry(file=TOKENIZER_FILE, sha256=tokenizer.sha256),
            tool_version=tool_version(), inputs_sha256=fingerprint, shards=tuple(entries),
        )
        write_file(aside / MANIFEST_NAME, manifest.to_json().encode())
    return manifest, False


def _shards(pairs: Iterable[RawPair], folder: Path, shard_bytes: int) -> Iterator[PairsEntry]:
    shard, num_shards = None, 0
    for number, pair in enumerate(pairs):
        shard = shard or ShardWriter(folder, num_shards, PAIR_BLOCK_BYTES)
        # Every image's suffix sorts before "txt", so that it stands first in the tar and in the row of the index.
        image = {".jpeg": "jpg", ".webp": "image.webp"}.get(pair.suffix, pair.suffix.removeprefix("."))
        shard.write(member_key(number, pair.key), {image: pair.image, "txt": pair.caption.encode("utf-8")})
        if shard.payload_bytes >= shard_bytes:
            yield PairsEntry(**shard.finish(), num_pairs=len(shard.rows))
            shard, num_shards = None, num_shards + 1
    if shard:
        yield PairsEntry(**shard.finish(), num_pairs=len(shard.rows))
