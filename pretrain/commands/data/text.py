"""The verbs of `trainyard data` on text: `corpus` counts documents, `tokenizer` trains one, `shard` writes datasets."""

import argparse
import filecmp
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from common.errors import ExitCode, UserError
from common.files import write_aside, writing
from pretrain.commands.arguments import local_path
from pretrain.commands.data.describe import MEGABYTE

if TYPE_CHECKING:
    from data_pipeline.text.corpus import Corpus, Part
    from data_pipeline.text.tokenizer import Tokenizer
    from data_pipeline.tokens.token_writer import WriteProgress

SECONDS_BETWEEN_LINES = 5.0


def add_verbs(verbs: argparse._SubParsersAction) -> None:
    """Add `corpus`, `tokenizer` and `shard`."""
    corpus = verbs.add_parser("corpus", help="count the documents of an input, and what is left out and why")
    _add_input(corpus)
    corpus.add_argument("--split", choices=("train", "heldout", "all"), default="all", help="which part (all)")
    corpus.add_argument("--to", type=local_path, metavar="FILE", help="also write the documents as .jsonl")

    tokenizer = verbs.add_parser("tokenizer", help="train a SentencePiece tokenizer on the training part of an input")
    _add_input(tokenizer)
    tokenizer.add_argument("--vocab-size", type=int, default=4096, help="exact number of token ids (4096)")
    tokenizer.add_argument("--algorithm", choices=("bpe", "unigram"), default="bpe", help="(bpe)")
    tokenizer.add_argument("--to", type=local_path, required=True, metavar="FILE", help="the model file to write")

    shard = verbs.add_parser("shard", help="tokenize documents into a dataset folder of tar shards")
    _add_input(shard)
    shard.add_argument("--tokenizer", type=local_path, required=True, metavar="FILE", help="a SentencePiece model")
    shard.add_argument("--to", type=local_path, required=True, metavar="DIR", help="the dataset folder to write")
    shard.add_argument("--split", choices=("train", "heldout", "all"), default="train", help="which part (train)")
    shard.add_argument("--shard-mb", type=float, default=64.0, help="token megabytes per shard (64)")
    shard.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="tokenizing threads (one per core)")


def _add_input(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="files, folders or URLs: text (.txt .md .rst .tex), code (.py), records (.jsonl .json .parquet), plain or "
             "as .gz .bz2 .zst, and tars of them; or `stdlib`: the source of Python's standard library",
    )
    parser.add_argument("--field", default="text", metavar="NAME",
                        help="the field of a record that holds its text; dots lead into nested ones: meta.text (text)")
    parser.add_argument("--code-suffix", nargs="+", default=(".py",), metavar="SUFFIX",
                        help="files that end so are code, one document each: .py .c .h (.py)")
    parser.add_argument(
        "--heldout-fraction", type=float, default=0.02, help="share of documents kept apart for evaluation (0.02)"
    )


def _open_corpus(args: argparse.Namespace, part: "Part") -> "Corpus":
    from data_pipeline.text.corpus import CorpusOptions, documents, standard_library_documents

    options = CorpusOptions(field=args.field, code_suffixes=tuple(args.code_suffix),
                            heldout_fraction=args.heldout_fraction)
    if args.input == ["stdlib"]:
        return standard_library_documents(options).select(part)
    return documents(args.input, options).select(part)


def _corpus(args: argparse.Namespace, console: Console) -> int:
    corpus = _open_corpus(args, args.split)
    if args.to is None:
        for _ in corpus:
            pass
    else:
        is_reused = _write_records(corpus, args.to)
        console.print(f"{args.to} is there already, with the same content: reused" if is_reused else f"wrote {args.to}")
    _print_corpus(corpus, console)
    return ExitCode.DONE


def _write_records(corpus: "Corpus", path: Path) -> bool:
    """Write one JSON object a line; True when the same file was there before."""
    from data_pipeline.left_out import printable

    with writing(path), write_aside(path) as aside:
        with open(aside, "w", encoding="utf-8") as file:
            for document in corpus:
                record = {"key": printable(document.key), "text": document.text}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        is_there = path.exists()
        if is_there and not filecmp.cmp(aside, path, shallow=False):
            raise UserError(f"{path} exists with other content; choose another --to or remove that file first")
    return is_there


def _print_corpus(corpus: "Corpus", console: Console) -> None:
    report = corpus.report
    console.print(
        f"{corpus.name} ({corpus.part}): {report.num_documents:,} documents, "
        f"{report.text_bytes / MEGABYTE:.1f} MB from {report.num_files:,} files"
    )
    for line in report.left_out.lines():
        console.print(f"  left out {line}")


def _tokenizer(args: argparse.Namespace, console: Console) -> int:
    from data_pipeline.text.tokenizer import TokenizerOptions, inputs_sha256, load_report, sample_text, train_tokenizer

    options = TokenizerOptions(vocab_size=args.vocab_size, algorithm=args.algorithm)
    corpus = _open_corpus(args, "train")
    for _ in corpus:
        pass
    _print_corpus(corpus, console)
    if not corpus.report.num_documents:
        raise UserError(corpus.nothing_left())
    sample = sample_text(corpus, corpus.report.text_bytes, options)
    fingerprint = inputs_sha256(sample, options)
    if args.to.exists():
        return _reuse_tokenizer(args.to, fingerprint, load_report(args.to), console)
    started = time.monotonic()
    with console.status("training"):
        tokenizer = train_tokenizer(sample, options)
    console.print(f"trained {args.algorithm} on {len(sample):,} blocks in {time.monotonic() - started:.1f} s")
    report = {"inputs_sha256": fingerprint, "algorithm": args.algorithm, "vocab_size": tokenizer.vocab_size}
    report |= _fertility(tokenizer, _open_corpus(args, "heldout"), _open_corpus(args, "train"))
    tokenizer.save(args.to, report)
    console.print(f"wrote {args.to}")
    _print_tokenizer(report, console)
    return ExitCode.DONE


def _reuse_tokenizer(path: Path, fingerprint: str, report: dict, console: Console) -> int:
    from data_pipeline.text.tokenizer import Tokenizer

    if report.get("inputs_sha256") != fingerprint or Tokenizer.load(path).sha256 != report.get("sha256"):
        raise UserError(
            f"{path} exists and was made from other input or options; choose another --to or remove that file first"
        )
    console.print(f"{path} is there already, made from the same input: reused")
    _print_tokenizer(report, console)
    return ExitCode.DONE


def _fertility(tokenizer: "Tokenizer", heldout: "Corpus", train: "Corpus") -> dict:
    """Measured on text that the tokenizer was not trained on, or on the training part where there is no other."""
    from data_pipeline.text.tokenizer import measure

    measured_on = "held-out documents"
    found = measure(tokenizer, heldout)
    if found.num_documents == 0:
        measured_on = "training documents"
        found = measure(tokenizer, train)
    return {
        "measured_on": f"{found.num_documents} {measured_on}",
        "bytes_per_token": round(found.bytes_per_token, 4),
        "tokens_per_word": round(found.tokens_per_word, 4),
        "num_round_trip_errors": found.num_round_trip_errors,
    }


def _print_tokenizer(report: dict, console: Console) -> None:
    console.print(
        f"{report['vocab_size']} token ids; on {report['measured_on']}: "
        f"{report['bytes_per_token']:.3f} bytes per token, "
        f"{report['tokens_per_word']:.3f} tokens per word, {report['num_round_trip_errors']} round-trip errors"
    )


def _shard(args: argparse.Namespace, console: Console) -> int:
    from data_pipeline.text.tokenizer import Tokenizer
    from data_pipeline.tokens.token_writer import write_dataset

    corpus = _open_corpus(args, args.split)
    tokenizer = Tokenizer.load(args.tokenizer)
    with _shown_progress(console) as show:
        written = write_dataset(
            corpus,
            tokenizer,
            args.to,
            shard_bytes=round(args.shard_mb * MEGABYTE),
            split=args.split,
            num_threads=max(1, args.threads),
            progress=show,
            if_empty=corpus.nothing_left,
        )
    _print_corpus(corpus, console)
    manifest = written.manifest
    if written.is_reused:
        console.print(f"{args.to} is there already, made from the same input: reused")
    else:
        console.print(f"wrote {args.to}")
    console.print(
        f"{manifest.num_documents:,} documents, {manifest.num_tokens:,} tokens in {len(manifest.shards)} shards, "
        f"{manifest.text_bytes / manifest.num_tokens:.3f} bytes per token"
    )
    return ExitCode.DONE


@contextmanager
def _shown_progress(console: Console) -> Iterator:
    """Yield a callback for the shard writer: a live line on a terminal, a plain line every few seconds elsewhere."""
    started = time.monotonic()
    if not console.is_terminal:
        shown = _PlainLines(console, started)
        yield shown
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as live:
        task = live.add_task("tokenizing", total=None)
        yield lambda written: live.update(task, description=_progress_line(written, started))


class _PlainLines:
    """Prints progress at most every SECONDS_BETWEEN_LINES."""

    def __init__(self, console: Console, started: float) -> None:
        self.console = console
        self.started = started
        self.printed = started

    def __call__(self, written: "WriteProgress") -> None:
        now = time.monotonic()
        if now - self.printed >= SECONDS_BETWEEN_LINES:
            self.printed = now
            self.console.print(_progress_line(written, self.started))


def _progress_line(written: "WriteProgress", started: float) -> str:
    seconds = max(1e-9, time.monotonic() - started)
    return (
        f"{written.num_documents:,} documents, {written.num_tokens:,} tokens, "
        f"{written.num_documents / seconds:,.0f} documents/s, {written.text_bytes / MEGABYTE / seconds:.1f} MB/s"
    )


VERBS = {"corpus": _corpus, "tokenizer": _tokenizer, "shard": _shard}
