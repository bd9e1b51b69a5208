"""Recompute everything a dataset folder claims about itself: checksums, sample counts, every member, every token id or
image."""

import os
import tarfile
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

import numpy as np

from common.errors import DataError
from common.files import sha256_of
from data_pipeline.folder.manifest import Manifest, PairsManifest, ShardEntry, ShardFile, load_manifest
from data_pipeline.folder.shard_reader import Shard
from data_pipeline.image_text.images import BadImage, decode
from data_pipeline.image_text.pair_dataset import BadPair, PairsDataset
from data_pipeline.text.tokenizer import Tokenizer
from data_pipeline.tokens.token_dataset import TOKENS_SUFFIX, load_index

MAX_MEMBER_PROBLEMS = 20


@dataclass(frozen=True)
class FileReport:
    """What was found in one file of a dataset: nothing wrong when `problems` is empty.

    `num_samples` are documents, or pairs of image and caption; `unusable` are pairs that are stored as the manifest
    says and that training passes over.
    """

    name: str
    num_samples: int
    num_tokens: int
    problems: tuple[str, ...]
    _: KW_ONLY
    unusable: tuple[str, ...] = ()


def verify(folder: str | os.PathLike) -> Iterator[FileReport]:
    """Check the tokenizer and then each shard of a dataset, yielding a report for each as it is done.

    Raises DataError when there is no readable manifest.
    """
    folder = Path(folder)
    manifest = load_manifest(folder)
    yield FileReport(manifest.tokenizer.file, 0, 0, tuple(_tokenizer_problems(folder, manifest)))
    if isinstance(manifest, PairsManifest):
        yield from _pairs_reports(folder, manifest)
        return
    for entry in manifest.shards:
        yield _shard_report(folder, manifest, entry)


def _pairs_reports(folder: Path, manifest: PairsManifest) -> Iterator[FileReport]:
    """Every shard: its checksums, and every image decoded beside its caption."""
    problems = {entry.name: tuple(_file_problems(folder, entry)) for entry in manifest.shards}
    if any(problems.values()):  # pairs are numbered through all shards, so none can be read by number
        yield from (FileReport(name, 0, 0, found) for name, found in problems.items())
        return
    dataset, first = PairsDataset.open(folder), 0
    for entry in manifest.shards:
        unusable = []
        for number in range(first, first + entry.num_pairs):
            try:
                decode(dataset.pair(number).image)
            except BadPair as error:
                unusable.append(str(error))
            except BadImage as error:
                unusable.append(f"{dataset.place(number)}: {error}")
        yield FileReport(entry.name, entry.num_pairs, 0, (), unusable=tuple(unusable))
        first += entry.num_pairs


def _file_problems(folder: Path, entry: ShardFile) -> Iterator[str]:
    """What keeps a shard and its index from being those that were written."""
    for name, expected in ((entry.name, entry.sha256), (entry.index, entry.index_sha256)):
        try:
            if _sha256(folder / name) != expected:
                yield f"SHA-256 of {name} differs from the manifest"
        except DataError as error:
            yield error.message


def _tokenizer_problems(folder: Path, manifest: Manifest | PairsManifest) -> Iterator[str]:
    try:
        tokenizer = Tokenizer.load_copy(folder / manifest.tokenizer.file)
    except DataError as error:
        yield error.message
        return
    if tokenizer.sha256 != manifest.tokenizer.sha256:
        yield "SHA-256 differs from the manifest"
    if (tokenizer.vocab_size, tokenizer.end_of_text) != (manifest.vocab_size, manifest.end_of_text):
        yield "vocabulary size or end-of-text id differs from the manifest"


def _shard_report(folder: Path, manifest: Manifest, entry: ShardEntry) -> FileReport:
    problems: list[str] = []
    problems += _file_problems(folder, entry)
    num_documents = num_tokens = 0
    try:
        num_documents = _num_members(folder / entry.name)
        if num_documents != entry.num_documents:
            problems.append(f"{num_documents} documents where the manifest says {entry.num_documents}")
        index = load_index(folder, entry, manifest.bytes_per_token)
        found, num_tokens = _member_problems(Shard(folder, entry, index.checksums), index.rows, manifest)
        problems += found[:MAX_MEMBER_PROBLEMS]
        if len(found) > MAX_MEMBER_PROBLEMS:
            problems.append(f"{len(found) - MAX_MEMBER_PROBLEMS} further documents are damaged")
    except DataError as error:
        problems.append(error.message)
    return FileReport(entry.name, num_documents, num_tokens, tuple(problems))


def _member_problems(shard: Shard, rows: np.ndarray, manifest: Manifest) -> tuple[list[str], int]:
    """Problems of single documents, and the number of tokens of the sound ones."""
    problems = []
    num_tokens = 0
    for number, (offset, length_bytes, count) in enumerate(rows.tolist()):
        try:
            _, content = shard.member(offset, length_bytes, (TOKENS_SUFFIX,))
            fault = _token_fault(np.frombuffer(content, manifest.dtype), manifest)
        except DataError as error:
            fault = error.message
        if fault:
            problems.append(f"document {number} at byte {offset:,}: {fault}")
        else:
            num_tokens += count
    return problems, num_tokens


def _token_fault(tokens: np.ndarray, manifest: Manifest) -> str | None:
    if len(tokens) == 0:
        return "no tokens"
    if int(tokens.max()) >= manifest.vocab_size:
        return f"token id {int(tokens.max())} where the vocabulary ends at {manifest.vocab_size - 1}"
    if int(tokens[-1]) != manifest.end_of_text:
        return "does not end with end-of-text"
    return None


def _num_members(path: Path) -> int:
    """Members of a tar file, walked from header to header without the index."""
    try:
        with tarfile.open(path, "r:") as archive:
            return sum(member.isreg() and member.name.endswith(TOKENS_SUFFIX) for member in archive)
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"{path} is not a readable tar file: {error}") from None


def _sha256(path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
