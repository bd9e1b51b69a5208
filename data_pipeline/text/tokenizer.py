"""SentencePiece tokenizers: training one on a sample of a corpus, and exact, reversible use of one.

Any text comes back unchanged from `decode(encode(text))`: nothing is normalized, no space is added or removed, runs of
spaces and tabs are symbols of their own (so source code stays short), and what the vocabulary lacks is spelled
in bytes.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Protocol

import sentencepiece

from common.errors import DataError, UserError
from common.files import write_aside, writing
from data_pipeline.text.corpus import Document

END_OF_TEXT = "<|endoftext|>"
# SentencePiece writes a space as this character, so the character itself must be spelled in bytes to come back.
SPACE_MARK = "\u2581"
SPACE_RUNS = (2, 3, 4, 6, 8, 12, 16, 20, 24)
SAMPLE_BLOCK_CHARACTERS = 2_000
# A longer line is cut before white space into blocks, so that it is not taken or left as a whole. And SentencePiece
# drops, without a word, what is above its own limit.
MAX_LINE_CHARACTERS = 100_000
# A fixed number: the same input gives the same model on every machine.
TRAINING_THREADS = 2
MIN_VOCAB_SIZE = 300


class Tokenizer:
    """A SentencePiece model. Pickles as its bytes."""

    def __init__(self, model: bytes, name: str = "tokenizer") -> None:
        """Raises DataError when `model` is not a SentencePiece model that fits; `name` is used in messages."""
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, ValueError, OSError):
            raise DataError(f"{name} is not a SentencePiece model; train one with `trainyard data tokenizer`") from None
        self.model = model
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.vocab_size: int = self._processor.vocab_size()
        self.end_of_text: int = self._processor.eos_id()
        if self.end_of_text < 0:
            raise DataError(f"{name} has no end-of-text id (SentencePiece eos); train it with one")
        mark = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode("utf-8")]
        unknown = self._processor.unk_id()
        if unknown in mark:
            raise DataError(f"{name} has no byte fallback, so it would lose characters; train it with byte_fallback")
        self._mark_ids = mark

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Tokenizer":
        """Read a model file. Raises UserError when it cannot be read, DataError when it is not such a model."""
        try:
            model = Path(path).read_bytes()
        except OSError as error:
            raise UserError(f"cannot read tokenizer {path}: {error.strerror}") from None
        return cls(model, str(path))

    @classmethod
    def load_copy(cls, path: str | os.PathLike, sha256: str | None = None) -> "Tokenizer":
        """Read the model that belongs to a dataset folder or a checkpoint.

        Raises DataError when it is not whole, or its SHA-256 is not the one given.
        """
        try:
            tokenizer = cls.load(path)
        except UserError as error:
            raise DataError(error.message) from None
        if sha256 not in (None, tokenizer.sha256):
            raise DataError(f"tokenizer {path} was damaged or exchanged: its SHA-256 differs from the manifest")
        return tokenizer

    def __reduce__(self) -> tuple:
        return Tokenizer, (self.model,)

    def save(self, path: str | os.PathLike, report: dict) -> None:
        """Write `report`, how the tokenizer was made and measured, to `<path>.json`, and then the model to `path`.

        Raises UserError for a place that cannot be written, StorageError when the disk refuses.
        """
        path = Path(path)
        content = json.dumps({**report, "sha256": self.sha256}, indent=1, sort_keys=True) + "\n"
        with writing(path), write_aside(path) as model, write_aside(report_path(path)) as description:
            description.write_text(content, encoding="utf-8")
            model.write_bytes(self.model)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without end-of-text."""
        if SPACE_MARK not in text:
            return self._processor.encode(text)
        first, *others = text.split(SPACE_MARK)
        ids = self._processor.encode(first)
        for part in others:
            ids += self._mark_ids
            ids += self._processor.encode(part)
        return ids

    def encode_many(self, texts: Sequence[str], num_threads: int = 1) -> list[list[int]]:
        """`encode` of each text, on several threads; the result does not depend on their number."""
        if num_threads == 1 or any(SPACE_MARK in text for text in texts):
            return [self.encode(text) for text in texts]
        return self._processor.encode(list(texts), num_threads=num_threads)

    def pieces(self) -> list[str]:
        """The text of every token id, with SPACE_MARK for a space and `<0x41>` for a byte."""
        return self._processor.id_to_piece(list(range(self.vocab_size)))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; end-of-text has none."""
        return self._processor.decode([int(token) for token in ids])


@dataclass(frozen=True)
class TokenizerOptions:
    """How to train: exact vocabulary size (all 256 bytes and the special symbols included), and text to look at."""

    vocab_size: int = 4096
    algorithm: str = "bpe"
    sample_bytes: int = 8_000_000

    def __post_init__(self) -> None:
        if self.algorithm not in ("bpe", "unigram"):
            raise UserError(f"algorithm={self.algorithm!r} is not one of bpe, unigram")
        if self.vocab_size < MIN_VOCAB_SIZE:
            raise UserError(
                f"vocab_size={self.vocab_size} is too small: 256 ids spell bytes; use {MIN_VOCAB_SIZE} or more"
            )


@dataclass(frozen=True, kw_only=True)
class Fertility:
    """Tokens per word and bytes per token of a tokenizer, counted on some documents."""

    num_documents: int
    text_bytes: int
    num_words: int
    num_tokens: int
    num_round_trip_errors: int

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes that one token stands for, on average."""
        return self.text_bytes / max(1, self.num_tokens)

    @property
    def tokens_per_word(self) -> float:
        """Tokens per word, words being divided by white space."""
        return self.num_tokens / max(1, self.num_words)


def report_path(path: str | os.PathLike) -> Path:
    """The file beside a saved tokenizer that holds its report."""
    return Path(f"{os.fspath(path)}.json")


def load_report(path: str | os.PathLike) -> dict:
    """The report that was saved beside the tokenizer `path`; empty when there is none that can be read."""
    try:
        report = json.loads(report_path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return report if isinstance(report, dict) else {}


def sample_text(documents: Iterable[Document], total_bytes: int, options: TokenizerOptions) -> list[str]:
    """Blocks of whole lines from all over the corpus, about `sample_bytes` in all, chosen by their hash."""
    fraction = min(1.0, options.sample_bytes / max(1, total_bytes))
    chosen = []
    for document in documents:
        for block in _blocks(document.text):
            digest = hashlib.sha256(block.encode("utf-8")).digest()
            if int.from_bytes(digest[:8], "big") < fraction * 2**64:
                chosen.append(block)
    return chosen


def inputs_sha256(sample: Sequence[str], options: TokenizerOptions) -> str:
    """Fingerprint of everything that a trained model depends on."""
    digest = hashlib.sha256(repr(asdict(options)).encode())
    for block in sample:
        digest.update(hashlib.sha256(block.encode("utf-8")).digest())
    return digest.hexdigest()


def train_tokenizer(sample: Sequence[str], options: TokenizerOptions) -> Tokenizer:
    """Train on blocks of text; the same blocks give the same model, byte for byte.

    Raises DataError when there is no text, or too little of it for the vocabulary asked for.
    """
    if not any(block.strip() for block in sample):
        raise UserError("there is no text to train a tokenizer on")
    written = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample),
            model_writer=written,
            model_type=options.algorithm,
            vocab_size=options.vocab_size,
            hard_vocab_limit=True,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            # Training text may not contain tabs inside a piece, so the tab is a symbol; newlines join pieces freely.
            user_defined_symbols=["\t", *(SPACE_MARK * length for length in SPACE_RUNS)],
            unk_id=0,
            eos_id=1,
            eos_piece=END_OF_TEXT,
            bos_id=-1,
            pad_id=-1,
            # In bytes; the default would drop long blocks in silence.
            max_sentence_length=1 << 24,
            num_threads=TRAINING_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        # What stands before the last bracket is the place in SentencePiece's source.
        detail = str(error).strip().rpartition("] ")[2]
        text = f"{sum(map(len, sample)):,} characters of training text"
        if "ocabulary size" in detail or "vocab_size" in detail:
            raise UserError(f"vocab_size={options.vocab_size} does not fit {text}; change vocab_size or give more text "
                            f"(SentencePiece: {detail})") from None
        raise UserError(f"SentencePiece cannot train a {options.algorithm} tokenizer on {text}: {detail}") from None
    return Tokenizer(written.getvalue())


def measure(tokenizer: Tokenizer, documents: Iterable[Document]) -> Fertility:
    """Encode and decode documents; see Fertility."""
    num_documents = text_bytes = num_words = num_tokens = num_errors = 0
    for document in documents:
        ids = tokenizer.encode(document.text)
        num_documents += 1
        text_bytes += len(document.text.encode("utf-8"))
        num_words += len(document.text.split())
        num_tokens += len(ids)
        num_errors += tokenizer.decode(ids) != document.text
    return Fertility(num_documents=num_documents, text_bytes=text_bytes, num_words=num_words, num_tokens=num_tokens,
                     num_round_trip_errors=num_errors)


def _blocks(text: str) -> Iterator[str]:
    """Cut text after lines into blocks of about SAMPLE_BLOCK_CHARACTERS; joined they are the text again."""
    lines: list[str] = []
    num_characters = 0
    for line in chain.from_iterable(map(_parts, text.splitlines(keepends=True))):
        lines.append(line)
        num_characters += len(line)
        if num_characters >= SAMPLE_BLOCK_CHARACTERS:
            yield "".join(lines)
            lines, num_characters = [], 0
    if lines:
        yield "".join(lines)


def _parts(line: str) -> Iterator[str]:
    """The line itself; one above MAX_LINE_CHARACTERS in parts of at most SAMPLE_BLOCK_CHARACTERS, cut before white
    space where there is some."""
    if len(line) <= MAX_LINE_CHARACTERS:
        yield line
        return
    start = 0
    while len(line) - start > SAMPLE_BLOCK_CHARACTERS:
        end = start + SAMPLE_BLOCK_CHARACTERS
        cut = max(line.rfind(" ", start + 1, end), line.rfind("\t", start + 1, end))
        cut = cut if cut > 0 else end
        yield line[start:cut]
        start = cut
    yield line[start:]


class TextTokenizer(Protocol):
    """The interface of every tokenizer: one trained here, or one of another project behind an adapter."""

    vocab_size: int
    end_of_text: int
    sha256: str  # of the files that decide its ids

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def pieces(self) -> list[str]: ...
