"""Recompute everything a dataset folder claims about itself: checksums, sample counts, every member, every token id or
image."""

import os
import tarfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import KW_ONLY, dataclass
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from common.errors import DataError
from common.files import sha256_of
from data_pipeline.folder.manifest import Manifest, PairsManifest, ShardFile, load_manifest
from data_pipeline.folder.shard_reader import Shard
from data_pipeline.image_text.images import BadImage, decode
from data_pipeline.image_text.pair_dataset import BadPair, PairsDataset, load_pairs_index
from data_pipeline.text.tokenizer import Tokenizer
from data_pipeline.tokens.token_dataset import TOKENS_SUFFIX, load_index

MAX_MEMBER_PROBLEMS = 20
BYTES_PER_PROCESS = 64 * 2**20  # of shards; a process takes a second to start


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


def verify(folder: str | os.PathLike, processes: int | None = None) -> Iterator[FileReport]:
    """Check the tokenizer and then each shard of a dataset, yielding a report for each in the manifest's order.

    `processes` check shards at the same time (None: one for each CPU, but none for less than BYTES_PER_PROCESS of
    shards); the reports are the same for any number. Raises DataError when there is no readable manifest.
    """
    folder = Path(folder)
    manifest = load_manifest(folder)
    yield FileReport(manifest.tokenizer.file, 0, 0, tuple(_tokenizer_problems(folder, manifest)))
    # Each with the manifest of a dataset that has this shard only: samples are then numbered within the shard.
    parts = [manifest.model_copy(update={"shards": (entry,)}) for entry in manifest.shards]
    useful = min(len(os.sched_getaffinity(0)), manifest.size_bytes // BYTES_PER_PROCESS)
    processes = min(processes or useful, len(parts))
    if processes <= 1:
        yield from map(_shard_report, repeat(folder), parts)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_shard_report, repeat(folder), parts)


def _shard_report(folder: Path, manifest: Manifest | PairsManifest) -> FileReport:
    """The report of the only shard of a manifest."""
    [entry] = manifest.shards
    problems = list(_file_problems(folder, entry))
    try:
        if isinstance(manifest, PairsManifest):
            return _pairs_report(folder, manifest, tuple(problems))
        return _tokens_report(folder, manifest, tuple(problems))
    except DataError as error:
        return FileReport(entry.name, 0, 0, (*problems, error.message))


def _pairs_report(folder: Path, manifest: PairsManifest, problems: tuple[str, ...]) -> FileReport:
    """Every image decoded beside its caption."""
    dataset = PairsDataset(folder, manifest, [load_pairs_index(folder, manifest.shards[0])], image_size=1)
    unusable = []
    for number in range(len(dataset)):
        try:
            decode(dataset.pair(number).image)
        except BadPair as error:
            unusable.append(str(error))
        except BadImage as error:
            unusable.append(f"{dataset.place(number)}: {error}")
    return FileReport(manifest.shards[0].name, len(dataset), 0, problems, unusable=tuple(unusable))


def _tokens_report(folder: Path, manifest: Manifest, problems: tuple[str, ...]) -> FileReport:
    """Every document's tar header and token ids."""
    [entry] = manifest.shards
    index = load_index(folder, entry, manifest.bytes_per_token)
    found, num_tokens = _member_problems(Shard(folder, entry, index.checksums), index.rows, manifest)
    more = [f"{len(found) - MAX_MEMBER_PROBLEMS} further documents are damaged"] if found[MAX_MEMBER_PROBLEMS:] else []
    try:
        num_documents = _num_members(folder / entry.name)
    except DataError as error:
        num_documents, more = 0, [*more, error.message]
    else:
        if num_documents != entry.num_documents:
            more.append(f"{num_documents} documents where the manifest says {entry.num_documents}")
    return FileReport(entry.name, num_documents, num_tokens, (*problems, *found[:MAX_MEMBER_PROBLEMS], *more))


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
        tokenizer = Tokenizer.load_copy(folder / manifest.tokenizer.file, manifest.tokenizer.sha256)
    except DataError as error:
        yield error.message
        return
    if (tokenizer.vocab_size, tokenizer.end_of_text) != (manifest.vocab_size, manifest.end_of_text):
        yield "vocabulary size or end-of-text id differs from the manifest"


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
