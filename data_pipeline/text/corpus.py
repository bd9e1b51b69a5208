"""Documents from plain files: the standard library's own source, or files and folders that the user names.

A corpus can be iterated any number of times, always in the same order; it holds no text. What it left out, and why, is
counted in `corpus.report` of the latest pass.
"""

import hashlib
import json
import os
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

from common.errors import DataError, UserError

TEXT_SUFFIXES = (".txt", ".md")
CODE_SUFFIXES = (".py",)
RECORD_SUFFIXES = (".jsonl",)
SUFFIXES = TEXT_SUFFIXES + CODE_SUFFIXES + RECORD_SUFFIXES

Part = Literal["train", "heldout", "all"]


class Document(NamedTuple):
    """One document: `key` says where it comes from, `text` is valid Unicode that encodes to UTF-8."""

    key: str
    text: str


@dataclass(frozen=True)
class CorpusLimits:
    """What is left out, and how documents are divided.

    `max_file_bytes` and `max_line_characters` apply to code files. Prose files are cut at blank lines into documents of
    about `text_document_bytes`. `heldout_fraction` of the documents, chosen by their hash, are the held-out part.
    """

    max_file_bytes: int = 1_000_000
    max_line_characters: int = 1_000
    text_document_bytes: int = 16_384
    heldout_fraction: float = 0.02

    def __post_init__(self) -> None:
        if not 0 <= self.heldout_fraction < 1:
            raise UserError(f"heldout_fraction={self.heldout_fraction} is not in [0, 1)")


@dataclass
class Report:
    """Counts of one pass over a corpus."""

    num_files: int = 0
    num_documents: int = 0
    text_bytes: int = 0
    skipped: Counter = field(default_factory=Counter)


@dataclass
class Corpus:
    """An ordered, repeatable source of documents. `files` are (key, path) pairs in reading order."""

    name: str
    files: tuple[tuple[str, Path], ...]
    limits: CorpusLimits = field(default_factory=CorpusLimits)
    part: Part = "all"
    _: KW_ONLY
    report: Report = field(default_factory=Report)

    def select(self, part: Part) -> "Corpus":
        """The same corpus, but only its `part`."""
        return replace(self, part=part, report=Report())

    def __iter__(self) -> Iterator[Document]:
        """Yield documents of the chosen part; exact duplicates, empty and undecodable ones are counted and left out."""
        report = self.report = Report()
        seen: set[bytes] = set()
        for key, path in self.files:
            report.num_files += 1
            for document in _read(key, path, self.limits, report.skipped):
                encoded = document.text.encode("utf-8")
                digest = hashlib.sha256(encoded).digest()
                if digest[:16] in seen:
                    report.skipped["exact duplicate"] += 1
                    continue
                seen.add(digest[:16])
                if self.part != "all" and (self.part == "heldout") != _is_heldout(digest, self.limits):
                    report.skipped["belongs to the other part"] += 1
                    continue
                report.num_documents += 1
                report.text_bytes += len(encoded)
                yield document


def standard_library_documents(limits: CorpusLimits | None = None) -> Corpus:
    """The Python standard library's own `.py` source (with its tests, without site-packages), by relative path."""
    root = Path(sysconfig.get_path("stdlib"))
    files = tuple((key, path) for key, path in _walk(root, CODE_SUFFIXES))
    if not files:
        raise UserError(f"{root} holds no .py files; this Python comes without its source, name --input PATH instead")
    return Corpus("stdlib", files, limits or CorpusLimits())


def documents(paths: Sequence[str | os.PathLike], limits: CorpusLimits | None = None) -> Corpus:
    """Documents of files and folders: .txt and .md (cut at blank lines), .py, .jsonl (one document per "text").

    Raises UserError naming every path that does not exist, is of another kind, or holds nothing to read.
    """
    files: list[tuple[str, Path]] = []
    faults = []
    for path in map(Path, paths):
        if path.is_dir():
            found = _walk(path, SUFFIXES)
            files.extend(found)
            if not found:
                faults.append(f"{path} holds no {' '.join(SUFFIXES)} file")
        elif not path.is_file():
            faults.append(f"{path} does not exist")
        elif path.suffix not in SUFFIXES:
            faults.append(f"{path} is none of {' '.join(SUFFIXES)}")
        else:
            files.append((path.name, path))
    if faults or not files:
        raise UserError("; ".join(faults) or "no input was named")
    return Corpus(" ".join(map(str, paths)), tuple(files), limits or CorpusLimits())


def _walk(root: Path, suffixes: Sequence[str]) -> list[tuple[str, Path]]:
    """(relative path, path) of the files below `root`, sorted by relative path, third-party packages left out."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in ("site-packages", "dist-packages", "__pycache__")]
        for name in names:
            path = Path(folder, name)
            if path.suffix in suffixes and path.is_file():
                found.append((path.relative_to(root).as_posix(), path))
    return sorted(found)


def _read(key: str, path: Path, limits: CorpusLimits, skipped: Counter) -> Iterator[Document]:
    try:
        is_code = path.suffix in CODE_SUFFIXES
        if is_code and path.stat().st_size > limits.max_file_bytes:
            skipped["file too large"] += 1
            return
        content = path.read_bytes()
    except OSError as error:
        kind = UserError if isinstance(error, PermissionError | FileNotFoundError) else DataError
        raise kind(f"cannot read {path}: {error.strerror}") from None
    if path.suffix in RECORD_SUFFIXES:
        yield from _records(key, content, skipped)
        return
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        skipped["not UTF-8"] += 1
        return
    if not text:
        skipped["empty"] += 1
    elif not is_code:
        yield from _cut(key, text, limits.text_document_bytes)
    elif max(map(len, text.split("\n"))) > limits.max_line_characters:
        skipped["line too long"] += 1
    else:
        yield Document(key, text)


def _cut(key: str, text: str, document_bytes: int) -> Iterator[Document]:
    """Cut prose after the first blank line past `document_bytes`; the pieces joined are the text again."""
    lines: list[str] = []
    num_bytes = num_pieces = 0
    for line in text.splitlines(keepends=True):
        lines.append(line)
        num_bytes += len(line.encode("utf-8"))
        if num_bytes >= document_bytes and not line.strip():
            yield Document(f"{key}:{num_pieces}", "".join(lines))
            lines, num_bytes, num_pieces = [], 0, num_pieces + 1
    if lines:
        yield Document(f"{key}:{num_pieces}", "".join(lines))


def _records(key: str, content: bytes, skipped: Counter) -> Iterator[Document]:
    for number, line in enumerate(content.split(b"\n")):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            text = record["text"]
            text.encode("utf-8")
        except UnicodeError:
            skipped["not UTF-8"] += 1
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            skipped['no "text" in record'] += 1
        else:
            if text:
                yield Document(f"{key}:{number}", text)
            else:
                skipped["empty"] += 1


def _is_heldout(digest: bytes, limits: CorpusLimits) -> bool:
    return int.from_bytes(digest[16:24], "big") < limits.heldout_fraction * 2**64
