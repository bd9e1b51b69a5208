"""Documents of one stream: prose, code, JSON records, Parquet rows. Whatever is no document is counted with its reason.

Memory is that of one document: prose is read by lines, records by lines, Parquet by batches of rows.
"""

import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple, cast

from common.errors import UserError
from data_pipeline.left_out import LeftOut
from data_pipeline.text.open_input import Damaged

NOT_UTF8 = "not UTF-8"
MAX_PROSE_BYTES = 2**26  # prose without a blank line is cut here
MAX_RECORD_BYTES = 2**28
MAX_JSON_BYTES = 2**26  # of JSON that does not hold one object a line
MAX_FIELDS_NAMED = 8
ROWS_PER_BATCH = 64
PARQUET_BUFFER_BYTES = 2**20


class Document(NamedTuple):
    """One document: `key` says where it comes from, `text` is valid Unicode that encodes to UTF-8."""

    key: str
    text: str


@dataclass(frozen=True, kw_only=True)
class CorpusOptions:
    """How files are read, what is left out, and how documents are divided.

    `field` is the name of the text in JSON records and Parquet rows; dots lead into nested objects. Files that end in
    one of `code_suffixes` are one document each, and `max_file_bytes` and `max_line_characters` apply to them. Prose is
    cut at blank lines into documents of about `text_document_bytes`. `heldout_fraction` of the documents, chosen by
    their hash, are the held-out part.
    """

    field: str = "text"
    code_suffixes: tuple[str, ...] = (".py",)
    max_file_bytes: int = 1_000_000
    max_line_characters: int = 1_000
    text_document_bytes: int = 16_384
    heldout_fraction: float = 0.02

    def __post_init__(self) -> None:
        if not 0 <= self.heldout_fraction < 1:
            raise UserError(f"heldout_fraction={self.heldout_fraction} is not in [0, 1)")
        if not self.field:
            raise UserError("field is empty: it is the name of the text in a record, such as text or meta.text")
        wrong = [suffix for suffix in self.code_suffixes if not suffix.startswith(".") or len(suffix) < 2]
        if wrong:
            raise UserError(f"suffixes of code begin with a dot, as in .c and .rs; got {' '.join(wrong)}")


def prose(key: str, stream: BinaryIO, options: CorpusOptions, left_out: LeftOut) -> Iterator[Document]:
    """Documents cut after the first blank line past `text_document_bytes`; joined they are the text again.

    A document that is not UTF-8 is left out, and those around it stay.
    """
    lines: list[str] = []
    fault = ""
    num_bytes = num_pieces = 0

    def piece() -> Iterator[Document]:
        nonlocal lines, fault, num_bytes, num_pieces
        if fault:
            left_out.add(NOT_UTF8, fault)
        else:
            yield Document(f"{key}:{num_pieces}", "".join(lines))
        lines, fault, num_bytes, num_pieces = [], "", 0, num_pieces + 1

    for number, raw in enumerate(_lines_within(stream, MAX_PROSE_BYTES), 1):
        if number == 1 and raw.startswith((b"\xff\xfe", b"\xfe\xff")):
            left_out.add(NOT_UTF8, f"{key} (begins as UTF-16 does)")
            return
        try:
            found = raw.decode("utf-8").splitlines(keepends=True)
        except UnicodeDecodeError as error:
            fault = fault or f"{key}, line {number} (byte 0x{raw[error.start]:02x})"
            lines = []
            num_bytes += len(raw)
            continue
        for line in found:
            line_bytes = len(line) if line.isascii() else len(line.encode("utf-8"))
            if num_bytes and num_bytes + line_bytes > MAX_PROSE_BYTES:
                yield from piece()
            num_bytes += line_bytes
            if not fault:
                lines.append(line)
            if num_bytes >= options.text_document_bytes and not line.strip():
                yield from piece()
    if num_bytes:
        yield from piece()
    elif not num_pieces:
        left_out.add("empty", key)


def code(key: str, stream: BinaryIO, options: CorpusOptions, left_out: LeftOut) -> Iterator[Document]:
    """The whole file as one document."""
    content = stream.read(options.max_file_bytes + 1)
    if len(content) > options.max_file_bytes:
        left_out.add("file too large", f"{key} (above {options.max_file_bytes:,} bytes)")
        return
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        left_out.add(NOT_UTF8, f"{key}, line {content.count(10, 0, error.start) + 1}")
        return
    longest = max(map(len, text.split("\n")))
    if not text:
        left_out.add("empty", key)
    elif longest > options.max_line_characters:
        left_out.add("line too long", f"{key} ({longest:,} characters)")
    else:
        yield Document(key, text)


def records(key: str, stream: BinaryIO, options: CorpusOptions, left_out: LeftOut) -> Iterator[Document]:
    """The text of every JSON object of a file that holds one in each line."""
    for number, line in enumerate(_whole_lines(stream)):
        where = f"{key}, line {number + 1}"
        if line is None:
            left_out.add("record too long", f"{where} (above {MAX_RECORD_BYTES:,} bytes)")
        elif line.strip():
            yield from _record(f"{key}:{number}", where, line, options, left_out=left_out)


def json_file(key: str, stream: BinaryIO, options: CorpusOptions, left_out: LeftOut) -> Iterator[Document]:
    """A `.json` file: one object in each line as C4 has them, or one object or list for the whole file."""
    start = stream.readline(MAX_JSON_BYTES)
    if not _is_object(start):
        start += stream.read(max(0, MAX_JSON_BYTES - len(start)))
        if not start.strip():
            left_out.add("empty", key)
            return
        try:
            value = json.loads(start)
        except (ValueError, RecursionError):
            pass  # then lines of which the first is broken, counted one by one
        else:
            for number, record in enumerate(value if isinstance(value, list) else [value]):
                where = f"{key}, object {number + 1}"
                yield from _text_of(f"{key}:{number}", where, record, options.field, left_out=left_out)
            return
    yield from records(key, cast(BinaryIO, _Rejoined(start, stream)), options, left_out)


def parquet(key: str, stream: BinaryIO, options: CorpusOptions, left_out: LeftOut) -> Iterator[Document]:
    """The text of every row, read by batches and from the column of the field alone."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        table = ParquetFile(stream, buffer_size=PARQUET_BUFFER_BYTES, pre_buffer=False)
        column = _column(table.schema_arrow, options.field)
        if column is None:
            names = _named(table.schema_arrow.names)
            left_out.add(f'no field "{options.field}"', f"{key} (it has {names})", table.metadata.num_rows)
            return
        number, top = 0, column.partition(".")[0]
        for batch in table.iter_batches(ROWS_PER_BATCH, columns=[column], use_threads=False):
            for row in batch.column(0):
                where = f"{key}, row {number + 1}"
                try:
                    value = row.as_py()
                except UnicodeDecodeError:
                    left_out.add(NOT_UTF8, where)
                else:
                    record = {top: value} if isinstance(value, dict) else {column: value}
                    yield from _text_of(f"{key}:{number}", where, record, options.field, left_out=left_out)
                number += 1
    except pyarrow.ArrowException as error:
        raise Damaged(str(error).partition("\n")[0]) from None


def _column(schema: Any, field: str) -> str | None:
    """The name by which Parquet knows a field: of a column itself, or with dots inside one; None when it has none."""
    if field in schema.names:
        return field
    names = field.split(".")
    if names[0] not in schema.names:
        return None
    kind = schema.field(names[0]).type
    for name in names[1:]:
        position = getattr(kind, "get_field_index", lambda _: -1)(name)
        if position < 0:
            return None
        kind = kind.field(position).type
    return field


def _record(key: str, where: str, line: bytes, options: CorpusOptions, *, left_out: LeftOut) -> Iterator[Document]:
    try:
        record = json.loads(line)
    except UnicodeError:
        # json takes NUL bytes, which a crashed writer leaves, for UTF-16 or UTF-32.
        left_out.add("not JSON" if b"\0" in line else NOT_UTF8, where)
    except RecursionError:
        left_out.add("not JSON", f"{where} (nested too deep)")
    except ValueError as error:
        left_out.add("not JSON", f"{where} ({getattr(error, 'msg', error)})")
    else:
        yield from _text_of(key, where, record, options.field, left_out=left_out)


def _text_of(key: str, where: str, record: Any, field: str, *, left_out: LeftOut) -> Iterator[Document]:
    value = record
    if not isinstance(record, dict):
        left_out.add("not a JSON object", where)
        return
    if field in record:  # also a name that has dots itself
        value = record[field]
    else:
        for name in field.split("."):
            if not isinstance(value, dict) or name not in value:
                left_out.add(f'no field "{field}"', f"{where} (it has {_named(record)})")
                return
            value = value[name]
    try:
        text = value.decode("utf-8") if isinstance(value, bytes) else value
        if isinstance(text, str):
            text.encode("utf-8")
    except UnicodeError:
        left_out.add(NOT_UTF8, where)
        return
    if not isinstance(text, str):
        left_out.add(f'field "{field}" is not a string', f"{where} ({type(value).__name__})")
    elif not text:
        left_out.add("empty", where)
    else:
        yield Document(key, text)


def _named(fields: Iterable[str]) -> str:
    names = list(fields)
    more = f" and {len(names) - MAX_FIELDS_NAMED} more" if len(names) > MAX_FIELDS_NAMED else ""
    return (", ".join(name[:60] for name in names[:MAX_FIELDS_NAMED]) or "none") + more


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


class _Rejoined:
    """The lines of a stream of which the first part was read already."""

    def __init__(self, start: bytes, rest: BinaryIO) -> None:
        self._start, self._rest = io.BytesIO(start), rest

    def readline(self, limit: int) -> bytes:
        line = self._start.readline(limit)
        return line if line.endswith(b"\n") else line + self._rest.readline(limit - len(line))


def _whole_lines(stream: BinaryIO) -> Iterator[bytes | None]:
    """Every line; None for one above MAX_RECORD_BYTES, which is passed over."""
    while line := stream.readline(MAX_RECORD_BYTES):
        is_whole = line.endswith(b"\n") or len(line) < MAX_RECORD_BYTES
        yield line if is_whole else None
        while not is_whole:
            line = stream.readline(MAX_RECORD_BYTES)
            is_whole = line.endswith(b"\n") or len(line) < MAX_RECORD_BYTES


def _lines_within(stream: BinaryIO, limit: int) -> Iterator[bytes]:
    """Lines; one above `limit` bytes comes in several parts, cut before white space, or else between characters."""
    rest = b""
    while line := rest + stream.readline(limit - len(rest)):
        cut = len(line)
        if cut == limit and not line.endswith(b"\n"):
            cut = max(line.rfind(b" "), line.rfind(b"\t"))
            if cut < 1:
                cut = limit - next((back for back in range(1, 4) if line[-back] >= 0xC0), 0)
        yield line[:cut]
        rest = line[cut:]
