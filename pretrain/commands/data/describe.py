"""The verbs of `trainyard data` on a finished dataset folder: `verify` checks it, `stats` describes it."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from common.errors import ExitCode, UserError

if TYPE_CHECKING:
    import numpy as np

    from data_pipeline.folder.manifest import Manifest, PairsManifest
    from data_pipeline.verify import FileReport

MEGABYTE = 1e6
MAX_SHARDS_NAMED = 10
MAX_REASONS_NAMED = 3
MAX_PAIRS_MEASURED = 1000

Rows = list[tuple[str, str]]


def add_verbs(verbs: argparse._SubParsersAction) -> None:
    """Add `verify` and `stats`."""
    verify = verbs.add_parser("verify", help="recompute the checksums and counts of a dataset")
    verify.add_argument("folder", type=Path, metavar="DIR")
    verify.add_argument("--processes", type=int, metavar="N",
                        help="that check shards at the same time (one a CPU, where there are 64 MB for each)")
    verify.add_argument("--max-bad-fraction", type=float, default=0.01, metavar="F",
                        help="more unusable pairs than this part of all end with exit code 65 (0.01)")

    stats = verbs.add_parser("stats", help="what a dataset holds")
    stats.add_argument("folder", type=Path, metavar="DIR")
    stats.add_argument("--sequence-length", type=int, default=1024, help="tokens per sample to count with (1024)")


def verify(args: argparse.Namespace, console: Console) -> int:
    """Print a table of the problems of every file and of the shards with most unusable pairs.

    The exit code is 65 where a file has problems, or more pairs are unusable than training allows.
    """
    from data_pipeline.verify import verify as reports_of

    if args.processes is not None and args.processes < 1:
        raise UserError(f"--processes {args.processes} must be at least 1")
    if not 0 <= args.max_bad_fraction <= 1:
        raise UserError(f"--max-bad-fraction {args.max_bad_fraction:g} must be between 0 and 1")
    table = Table("file", "samples", "tokens", "problem")
    with console.status(f"verifying {args.folder}"):
        reports = list(reports_of(args.folder, args.processes))
    for report in reports:
        for problem in report.problems or ("none",):
            table.add_row(report.name, f"{report.num_samples:,}", f"{report.num_tokens:,}", problem)
    console.print(table)
    num_problems = sum(len(report.problems) for report in reports)
    num_samples, num_unusable = (sum(counts) for counts in zip(
        *((report.num_samples, len(report.unusable)) for report in reports), strict=True))
    if num_unusable:
        _print_unusable(reports, f"{num_unusable:,} of {num_samples:,} pairs cannot be used", console)
    if num_problems:
        console.print(f"{args.folder}: {num_problems} problems in {len(reports)} files; do not train on it")
        return ExitCode.DATA
    if num_unusable > args.max_bad_fraction * num_samples:
        console.print(f"{args.folder}: more than the part {args.max_bad_fraction:g} that --max-bad-fraction allows")
        return ExitCode.DATA
    console.print(f"{args.folder}: {len(reports)} files, all as the manifest says")
    return ExitCode.DONE


def _print_unusable(reports: "Sequence[FileReport]", heading: str, console: Console) -> None:
    """Under the heading: the shards with the largest part of unusable pairs, and the first reasons of each."""
    worst = sorted((report for report in reports if report.unusable),
                   key=lambda report: (-len(report.unusable) / report.num_samples, report.name))
    console.print(f"{heading}; training replaces them. The worst shards:")
    table = Table("file", "unusable", "of", "first reasons")
    for report in worst[:MAX_SHARDS_NAMED]:
        table.add_row(report.name, f"{len(report.unusable):,}", f"{report.num_samples:,}",
                      "\n".join(report.unusable[:MAX_REASONS_NAMED]))
    console.print(table)


def stats(args: argparse.Namespace, console: Console) -> int:
    """Print what a dataset folder of either kind holds."""
    from data_pipeline.folder.manifest import PairsManifest, load_manifest

    if args.sequence_length < 1:
        raise UserError(f"--sequence-length {args.sequence_length} must be at least 1")
    if isinstance(load_manifest(args.folder), PairsManifest):
        rows = _pairs_rows(args.folder)
    else:
        rows = _tokens_rows(args.folder, args.sequence_length)
    table = Table(show_header=False)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    return ExitCode.DONE


def _tokens_rows(folder: Path, sequence_length: int) -> Rows:
    from data_pipeline.order import num_windows
    from data_pipeline.tokens.token_dataset import TokenDataset

    dataset = TokenDataset.open(folder)
    manifest = dataset.manifest
    text = f"{manifest.text_bytes / MEGABYTE:.1f} MB, {manifest.text_bytes / manifest.num_tokens:.3f} bytes per token"
    counts = [("documents", f"{manifest.num_documents:,}"), ("tokens", f"{manifest.num_tokens:,}"), ("text", text),
              ("tokens per document", _spread(dataset.token_counts))]
    samples = f"{num_windows(manifest.num_tokens, sequence_length):,} an epoch"
    return [*_folder_rows(folder, manifest, counts, f", {manifest.dtype} ids"),
            (f"samples of {sequence_length} tokens", samples)]


def _pairs_rows(folder: Path) -> Rows:
    """The sizes of images and captions are those of the first pairs."""
    from data_pipeline.image_text.images import BadImage, decode
    from data_pipeline.image_text.pair_dataset import BadPair, PairsDataset

    dataset = PairsDataset.open(folder)
    num_measured = min(len(dataset), MAX_PAIRS_MEASURED)
    sides, lengths = [], []
    for number in range(num_measured):
        try:
            pair = dataset.pair(number)
            sides.append(min(decode(pair.image).size))
            lengths.append(len(dataset.tokenizer.encode(pair.caption)))
        except (BadPair, BadImage):
            continue
    measured = (("shorter side of images", sides), ("tokens of captions", lengths))
    return [*_folder_rows(folder, dataset.manifest, [("pairs", f"{dataset.manifest.num_pairs:,}")]),
            *((name, _spread(values)) for name, values in measured if values),
            ("usable", f"{len(sides):,} of the first {num_measured:,}")]


def _folder_rows(folder: Path, manifest: "Manifest | PairsManifest", counts: Rows, number_format: str = "") -> Rows:
    """The rows that both kinds of folder have, with the counts of one kind among them."""
    shards = f"{len(manifest.shards)}, {manifest.size_bytes / MEGABYTE:.1f} MB{number_format}"
    return [("folder", str(folder)), ("split", manifest.split), *counts, ("shards", shards),
            ("vocabulary", f"{manifest.vocab_size:,}, end-of-text is {manifest.end_of_text}"),
            ("tokenizer", f"{manifest.tokenizer.file}, SHA-256 {manifest.tokenizer.sha256[:16]}...")]


def _spread(values: "np.ndarray | Sequence[int]") -> str:
    import numpy as np

    least, median, most = np.percentile(values, (0, 50, 100))
    return f"{least:,.0f} least, {median:,.0f} median, {most:,.0f} most"


VERBS = {"verify": verify, "stats": stats}
