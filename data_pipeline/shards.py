"""Writing a dataset folder: tar shards of token ids, an index beside each, and a manifest. Same input, same bytes.

Everything is written to `<folder>.tmp` and renamed when complete, so a folder under its final name is finished.
"""

import errno
import fcntl
import hashlib
import importlib.metadata
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np
from webdataset import TarWriter

from data_pipeline.corpus import Document
from data_pipeline.errors import DataError
from data_pipeline.index import TAR_BLOCK_BYTES, TOKENS_SUFFIX, TokenDataset
from data_pipeline.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    TOKENIZER_FILE,
    Manifest,
    ShardEntry,
    TokenizerEntry,
)
from data_pipeline.tokenizer import Tokenizer

LOCK_NAME = "writer.lock"
DEFAULT_SHARD_BYTES = 64 * 2**20
DOCUMENTS_PER_BATCH = 64


@dataclass(frozen=True)
class Progress:
    """How far a writer is."""

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
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    split: str = "train",
    num_threads: int = 1,
    progress: Callable[[Progress], None] | None = None,
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

    Raises DataError when there is nothing to write, the folder holds something else, or the disk refuses.
    """
    folder = Path(folder)
    if shard_bytes < 1:
        raise DataError(f"shard_bytes={shard_bytes} must be at least 1")
    settings = f"{FORMAT_VERSION}/{tokenizer.sha256}/{shard_bytes}/{split}"
    if folder.exists() and not is_empty_folder(folder):
        return Written(_existing(folder, documents, settings), is_reused=True)
    try:
        with written_aside(folder) as aside:
            writer = _DatasetWriter(aside, tokenizer, shard_bytes)
            for batch in _batches(documents):
                writer.write(batch, tokenizer.encode_many([document.text for document in batch], num_threads))
                if progress:
                    progress(writer.progress)
            manifest = writer.finish(split, settings)
    except OSError as error:
        raise DataError(f"cannot write {folder}: {advice(error)}") from None
    return Written(manifest, is_reused=False)


class _DatasetWriter:
    """Writes shards into one folder and counts what it writes."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, shard_bytes: int) -> None:
        self.folder = folder
        self.tokenizer = tokenizer
        self.shard_bytes = shard_bytes
        self.dtype = "<u2" if tokenizer.vocab_size <= 2**16 else "<u4"
        self.progress = Progress(0, 0, 0)
        self.entries: list[ShardEntry] = []
        self.shard: ShardWriter | None = None
        self.inputs = _InputsDigest()

    def write(self, documents: list[Document], encoded: list[list[int]]) -> None:
        for document, ids in zip(documents, encoded, strict=True):
            if self.shard is None:
                self.shard = ShardWriter(self.folder, len(self.entries))
            tokens = np.array([*ids, self.tokenizer.end_of_text], dtype=self.dtype)
            key = member_key(self.progress.num_documents, document.key)
            self.shard.write(key, {TOKENS_SUFFIX.removeprefix("."): tokens.tobytes()}, len(tokens))
            before = self.progress
            self.progress = Progress(
                before.num_documents + 1, before.text_bytes + self.inputs.add(document), before.num_tokens + len(tokens)
            )
            if self.shard.payload_bytes >= self.shard_bytes:
                self._finish_shard()

    def finish(self, split: str, settings: str) -> Manifest:
        if self.shard is not None:
            self._finish_shard()
        if not self.entries:
            raise DataError(
                f"no document is left for split {split!r}; give more input or another share of held-out documents"
            )
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

    def _finish_shard(self) -> None:
        num_tokens = sum(row[-1] for row in self.shard.rows)
        entry = ShardEntry(**self.shard.finish(), num_documents=len(self.shard.rows), num_tokens=num_tokens)
        self.entries.append(entry)
        self.shard = None


class _HashingFile:
    """A file that takes the hash of what is written to it on the way."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.sha256 = hashlib.sha256()

    def write(self, content: bytes) -> int:
        self.sha256.update(content)
        return self.file.write(content)


class ShardWriter:
    """One tar file, written by webdataset, and the index of its members."""

    def __init__(self, folder: Path, number: int) -> None:
        self.path = folder / f"shard-{number:06d}.tar"
        self.index_path = folder / f"shard-{number:06d}.index.npy"
        self.payload_bytes = 0
        self.rows: list[tuple[int, ...]] = []
        self._end = 0
        self._file = open(self.path, "xb")  # noqa: SIM115 - closed by finish(), or with the process when it failed
        self._hashing = _HashingFile(self._file)
        # One owner, one mode, one time for every member: the bytes then depend on the documents only.
        self._tar = TarWriter(self._hashing, user="trainyard", group="trainyard", mtime=0, encoder=False)

    def write(self, key: str, members: Mapping[str, bytes], *numbers: int) -> None:
        """One sample: its files by suffix, in alphabetical order (webdataset's). Its row of the index holds offset and
        length of each, and then `numbers`."""
        self._tar.write({"__key__": key, **members})
        row = []
        for _, content in sorted(members.items()):
            row += [self._end + TAR_BLOCK_BYTES, len(content)]
            self._end += TAR_BLOCK_BYTES + -(-len(content) // TAR_BLOCK_BYTES) * TAR_BLOCK_BYTES
            self.payload_bytes += len(content)
        self.rows.append((*row, *numbers))

    def finish(self) -> dict:
        """Close the shard and write its index; what a manifest says of the two files."""
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        rows = np.array(self.rows, dtype="<i8")
        np.save(self.index_path, rows, allow_pickle=False)
        index = self.index_path.read_bytes()
        return {
            "name": self.path.name,
            "size_bytes": self.path.stat().st_size,
            "sha256": self._hashing.sha256.hexdigest(),
            "index": self.index_path.name,
            "index_bytes": len(index),
            "index_sha256": hashlib.sha256(index).hexdigest(),
        }


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


def member_key(number: int, document_key: str) -> str:
    """Unique key of a document in its shard: its number, and what is readable of where it came from.

    Without dots (webdataset ends a key at the first one) and short enough for a plain tar header of one block.
    """
    readable = re.sub(r"[^A-Za-z0-9_-]+", "-", document_key)[-60:].strip("-")
    return f"{number:012d}-{readable}" if readable else f"{number:012d}"


def _existing(folder: Path, documents: Iterable[Document], settings: str) -> Manifest:
    try:
        manifest = TokenDataset.open(folder).manifest
    except DataError as error:
        raise DataError(f"{folder} is in the way: {error}; choose another folder or remove that one") from None
    inputs = _InputsDigest()
    for document in documents:
        inputs.add(document)
    if inputs.hexdigest(settings) != manifest.inputs_sha256:
        raise DataError(
            f"{folder} holds a dataset made from other documents, tokenizer or settings; "
            f"choose another folder or remove that one first"
        )
    return manifest


@contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """A fresh folder beside `folder`, renamed to it when the block ends well and removed when it does not.

    What a killed writer left is removed, but only when it has our lock file and no living writer holds that.
    """
    aside = folder.with_name(folder.name + ".tmp")
    lock = aside / LOCK_NAME
    folder.parent.mkdir(parents=True, exist_ok=True)
    if lock.is_file():
        with open(lock, "rb") as left:
            _lock(left, aside)
            shutil.rmtree(aside)
    elif aside.is_dir() and is_empty_folder(aside):
        aside.rmdir()
    try:
        aside.mkdir()
    except FileExistsError:
        raise DataError(f"{aside} is in the way and was not made by this tool; move it elsewhere") from None
    with open(lock, "wb") as held:
        _lock(held, aside)
        try:
            yield aside
            _sync(aside)
            aside.rename(folder)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        # Only now: a kill before the rename must leave a folder that the next run may remove.
        (folder / LOCK_NAME).unlink()
        _sync(folder.parent)


def _lock(file: BinaryIO, aside: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        raise DataError(f"another process is writing {aside}; wait for it, or choose another folder") from None


def is_empty_folder(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    source = iter(documents)
    while batch := list(islice(source, DOCUMENTS_PER_BATCH)):
        yield batch


def write_file(path: Path, content: bytes) -> None:
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def advice(error: OSError) -> str:
    known = {
        errno.ENOSPC: "no space left on the device; free some, or write elsewhere",
        errno.EDQUOT: "the disk quota is used up; free some, or write elsewhere",
        errno.EACCES: "permission denied; choose a folder that you may write to",
        errno.EFBIG: "the file size limit of this process is used up; raise it, or write smaller shards",
        errno.EEXIST: "a file stands where a folder is needed; choose another folder",
        errno.ENOTDIR: "a file stands where a folder is needed; choose another folder",
        errno.EROFS: "the file system is read-only; choose a folder that you may write to",
    }
    return known.get(error.errno, str(error))


def tool_version() -> str:
    try:
        return f"trainyard {importlib.metadata.version('trainyard')}"
    except importlib.metadata.PackageNotFoundError:
        return "trainyard (not installed)"
