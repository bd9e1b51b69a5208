"""Documents from plain files: the standard library's own source, or files, folders and URLs that the user names.

A corpus can be iterated any number of times, always in the same order; it holds no text. What it left out, and why, is
counted in `corpus.report` of the latest pass.
"""

import hashlib
import os
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, Literal

from common.errors import UserError
from data_pipeline.left_out import LeftOut, printable
from data_pipeline.text import readers
from data_pipeline.text.find_files import NO_SUCH_SUFFIX, FileKind, TextFile, files_below, find, kind_of
from data_pipeline.text.open_input import Damaged, damage, decompressed, opened, tar_members
from data_pipeline.text.readers import CorpusOptions, Document

READERS = {"prose": readers.prose, "code": readers.code, "records": readers.records, "json": readers.json_file,
           "parquet": readers.parquet}
DIGEST_BYTES = 16
OTHER_PART = "belongs to the other part"

Part = Literal["train", "heldout", "all"]


@dataclass
class Report:
    """Counts of one pass over a corpus."""

    num_files: int = 0
    num_documents: int = 0
    text_bytes: int = 0
    left_out: LeftOut = field(default_factory=LeftOut)


@dataclass
class Corpus:
    """An ordered, repeatable source of documents. `files` are in reading order, `passed_over` counts the others."""

    name: str
    files: tuple[TextFile, ...]
    options: CorpusOptions = field(default_factory=CorpusOptions)
    part: Part = "all"
    _: KW_ONLY
    passed_over: LeftOut = field(default_factory=LeftOut)
    report: Report = field(default_factory=Report)

    def select(self, part: Part) -> "Corpus":
        """The same corpus, but only its `part`."""
        return replace(self, part=part, report=Report())

    def __iter__(self) -> Iterator[Document]:
        """Yield documents of the chosen part; exact duplicates, and whatever is no document, are counted and left out.

        Raises UserError or DataError naming a file that cannot be read.
        """
        report = self.report = Report(left_out=self.passed_over.copy())
        seen = _Digests()
        for file in self.files:
            report.num_files += 1
            for document in _read(file, self.options, report.left_out):
                encoded = document.text.encode("utf-8")
                digest = hashlib.sha256(encoded).digest()
                if not seen.add(digest[:DIGEST_BYTES]):
                    report.left_out.add("exact duplicate", document.key)
                    continue
                if self.part != "all" and (self.part == "heldout") != _is_heldout(digest, self.options):
                    report.left_out.add(OTHER_PART)
                    continue
                report.num_documents += 1
                report.text_bytes += len(encoded)
                yield document

    def nothing_left(self) -> str:
        """Why the latest pass gave no document, and what to change."""
        found = self.report.left_out
        advice = "give more input"
        if OTHER_PART in found.counts:
            advice += ", or another share of held-out documents"
        if any(reason.startswith(("no field", "field")) for reason in found.counts):
            advice += ", or name the field that holds the text (--field)"
        return "\n".join([f"no document is left for split {self.part!r} of {self.name}; {advice}. Left out:",
                          *(f"  {line}" for line in found.lines() or ["nothing: there are no files with text"])])


def standard_library_documents(options: CorpusOptions | None = None) -> Corpus:
    """The Python standard library's own `.py` source (with its tests, without site-packages), by relative path."""
    root = Path(sysconfig.get_path("stdlib"))
    files = tuple(file for file in files_below(root, LeftOut()) if file.key.endswith(".py"))
    if not files:
        raise UserError(f"{root} holds no .py files; this Python comes without its source, name --input PATH instead")
    return Corpus("stdlib", files, options or CorpusOptions())


def documents(paths: Sequence[str | os.PathLike], options: CorpusOptions | None = None) -> Corpus:
    """Documents of files, folders and URLs, by suffix (see `find_files.SUFFIXES`), compressed or in tars as well.

    Raises UserError naming every path that does not exist, is of another kind, or holds nothing to read.
    """
    options = options or CorpusOptions()
    files, passed_over = find(paths, options.code_suffixes)
    name = printable(" ".join(os.fspath(path) for path in paths))
    return Corpus(name, tuple(files), options, passed_over=passed_over)


def _read(file: TextFile, options: CorpusOptions, left_out: LeftOut) -> Iterator[Document]:
    kind = kind_of(file.key, options.code_suffixes)
    assert kind is not None  # `find` gives no others
    with _told(file.key, left_out), opened(file.location, kind.compression) as stream:
        if kind.content == "tar":
            yield from _of_tar(file.key, stream, options, left_out)
        else:
            yield from READERS[kind.content](file.key, stream, options, left_out)


@contextmanager
def _told(key: str, left_out: LeftOut) -> Iterator[None]:
    """Counts damage of a file."""
    try:
        yield
    except Damaged as error:
        left_out.add("damaged or cut short, and not read from there on", f"{key} ({error})")


def _of_tar(key: str, stream: BinaryIO, options: CorpusOptions, left_out: LeftOut) -> Iterator[Document]:
    with closing(tar_members(stream, key, left_out)) as members:
        for member in members:
            where = f"{key}/{member.name}"
            kind = kind_of(member.name, options.code_suffixes)
            if member.name.rpartition("/")[2].startswith("._"):
                left_out.add("a note of macOS on another file", where)
            elif kind is None or kind.content in ("tar", "parquet"):  # which need a file of their own
                left_out.add(NO_SUCH_SUFFIX, where)
            else:
                yield from _of_member(where, member.content, kind, options=options, left_out=left_out)


def _of_member(key: str, content: BinaryIO, kind: FileKind, *, options: CorpusOptions, left_out: LeftOut
               ) -> Iterator[Document]:
    read = READERS[kind.content]
    if not kind.compression:  # damage is that of the tar
        yield from read(key, content, options, left_out)
        return
    with _told(key, left_out), damage():
        yield from read(key, decompressed(content, kind.compression), options, left_out)


class _Digests:
    """A set of hashes that takes little more memory than the hashes themselves: Python's own takes six times that.

    Hashes that begin alike lie one after the other in the bytes of their group.
    """

    def __init__(self) -> None:
        self._groups: dict[bytes, bytearray] = {}

    def add(self, digest: bytes) -> bool:
        """False when the hash was there already."""
        group = self._groups.setdefault(digest[:2], bytearray())
        rest = digest[2:]
        place = group.find(rest)
        while place >= 0 and place % len(rest):  # found across two others
            place = group.find(rest, place + 1)
        if place >= 0:
            return False
        group += rest
        return True


def _is_heldout(digest: bytes, options: CorpusOptions) -> bool:
    return int.from_bytes(digest[16:24], "big") < options.heldout_fraction * 2**64
