"""Writing a dataset folder: tar shards of token ids, an index beside each, and a manifest. Same input, same bytes.

Everything is written to `<folder>.tmp` and renamed when complete, so a folder under its final name is finished.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.errors import TrainyardError, UserError
from common.files import is_empty_folder, write_file, write_folder_aside, writing
from data_pipeline.folder.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    TOKENIZER_FILE,
    Manifest,
    ShardEntry,
    TokenizerEntry,
)
from data_pipeline.folder.shard_index import TOKEN_BLOCK_BYTES
from data_pipeline.folder.shard_writer import (
    DEFAULT_SHARD_BYTES,
    ShardWriter,
    member_key,
    tool_version,
)
from data_pipeline.text.corpus import Document
from data_pipeline.text.tokenizer import Tokenizer
from data_pipeline.tokens.token_dataset import TOKENS_SUFFIX, TokenDataset

DOCUMENTS_PER_BATCH = 64
CHARACTERS_PER_BATCH = 2_000_000


@dataclass(frozen=True)
class WriteProgress:
    """What a writer has written so far."""

    num_documents: int
    text_bytes: int
    num_tokens: int


@dataclass(frozen=True)
class Written:
    """The finished dataset, and whether it was there already."""

    manifest: Manifest
    is_reused: bool


def write_dataset(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    folder: str | os.PathLike,
    *,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    split: str = "train",
    num_threads: int = 1,
    progress: Callable[[WriteProgress], None] | None = None,
    if_empty: Callable[[], str] | None = None,
) -> Written:
    """Tokenize documents into `folder`, or reuse it when it was made from the same inputs.

    Args:
        documents: can be iterated more than once, with the same result.
        tokenizer: its model is copied into the folder.
        folder: made by this call; its parent too.
        shard_bytes: token bytes after which a new shard is begun.
        split: name recorded in the manifest.
        num_threads: threads that tokenize; the written bytes do not depend on it.
        progress: called after every batch of documents.
        if_empty: gives the message of the error when there was no document.

    Raises UserError when there is nothing to write or the folder holds something else, StorageError when the disk
    refuses.
    """
    folder = Path(folder)
    if shard_bytes < 1:
        raise UserError(f"shard_bytes={shard_bytes} must be at least 1")
    settings = f"{FORMAT_VERSION}/{tokenizer.sha256}/{shard_bytes}/{split}"
    if folder.exists() and not is_empty_folder(folder):
        return Written(_existing(folder, documents, settings), is_reused=True)
    with writing(folder), write_folder_aside(folder) as aside:
        writer = _DatasetWriter(aside, tokenizer, shard_bytes)
        for batch in _batches(documents):
            writer.write(batch, tokenizer.encode_many([document.text for document in batch], num_threads))
            if progress:
                progress(writer.progress)
        if not writer.progress.num_documents:
            raise UserError(if_empty() if if_empty else f"no document is left for split {split!r}; give more input or "
                            "another share of held-out documents")
        manifest = writer.finish(split, settings)
    return Written(manifest, is_reused=False)


class _DatasetWriter:
    """Writes shards into one folder and counts what it writes."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, shard_bytes: int) -> None:
        self.folder = folder
        self.tokenizer = tokenizer
        self.shard_bytes = shard_bytes
        self.dtype = "<u2" if tokenizer.vocab_size <= 2**16 else "<u4"
        self.progress = WriteProgress(0, 0, 0)
        self.entries: list[ShardEntry] = []
        self.shard: ShardWriter | None = None
        self.inputs = _InputsDigest()

    def write(self, documents: list[Document], encoded: list[list[int]]) -> None:
        for document, ids in zip(documents, encoded, strict=True):
            if self.shard is None:
                self.shard = ShardWriter(self.folder, len(self.entries), TOKEN_BLOCK_BYTES)
            tokens = np.array([*ids, self.tokenizer.end_of_text], dtype=self.dtype)
            key = member_key(self.progress.num_documents, document.key)
            self.shard.write(key, {TOKENS_SUFFIX.removeprefix("."): tokens.tobytes()}, len(tokens))
            before = self.progress
            self.progress = WriteProgress(
                before.num_documents + 1, before.text_bytes + self.inputs.add(document), before.num_tokens + len(tokens)
            )
            if self.shard.payload_bytes >= self.shard_bytes:
                self._finish_shard(self.shard)

    def finish(self, split: str, settings: str) -> Manifest:
        if self.shard is not None:
            self._finish_shard(self.shard)
        write_file(self.folder / TOKENIZER_FILE, self.tokenizer.model)
        manifest = Manifest(
            split=split,
            num_documents=self.progress.num_documents,
            num_tokens=self.progress.num_tokens,
            text_bytes=self.progress.text_bytes,
            dtype=self.dtype,
            vocab_size=self.tokenizer.vocab_size,
            end_of_text=self.tokenizer.end_of_text,
            tokenizer=TokenizerEntry(file=TOKENIZER_FILE, sha256=self.tokenizer.sha256),
            tool_version=tool_version(),
            inputs_sha256=self.inputs.hexdigest(settings),
            shards=tuple(self.entries),
        )
        write_file(self.folder / MANIFEST_NAME, manifest.to_json().encode())
        return manifest

    def _finish_shard(self, shard: ShardWriter) -> None:
        num_tokens = sum(row[-1] for row in shard.rows)
        entry = ShardEntry(**shard.finish(), num_documents=len(shard.rows), num_tokens=num_tokens)
        self.entries.append(entry)
        self.shard = None


class _InputsDigest:
    """Fingerprint of documents and settings: tells whether a finished dataset is the one that is asked for."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, document: Document) -> int:
        """Take a document in; returns its UTF-8 bytes."""
        content = document.text.encode("utf-8")
        self._digest.update(hashlib.sha256(document.key.encode("utf-8", "surrogateescape") + b"\0" + content).digest())
        return len(content)

    def hexdigest(self, settings: str) -> str:
        return hashlib.sha256(self._digest.digest() + settings.encode()).hexdigest()


def _existing(folder: Path, documents: Iterable[Document], settings: str) -> Manifest:
    try:
        manifest = TokenDataset.open(folder).manifest
    except TrainyardError as error:
        raise type(error)(f"{folder} is in the way: {error}; choose another folder or remove that one") from None
    inputs = _InputsDigest()
    for document in documents:
        inputs.add(document)
    if inputs.hexdigest(settings) != manifest.inputs_sha256:
        raise UserError(
            f"{folder} holds a dataset made from other documents, tokenizer or settings; "
            f"choose another folder or remove that one first"
        )
    return manifest


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Up to DOCUMENTS_PER_BATCH documents, fewer where they are long: token ids take more memory than their text."""
    batch: list[Document] = []
    num_characters = 0
    for document in documents:
        batch.append(document)
        num_characters += len(document.text)
        if len(batch) == DOCUMENTS_PER_BATCH or num_characters >= CHARACTERS_PER_BATCH:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


