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

MEGABYTE = 1e6
MAX_UNUSABLE_NAMED = 10
MAX_PAIRS_MEASURED = 1000

Rows = list[tuple[str, str]]


def add_verbs(verbs: argparse._SubParsersAction) -> None:
    """Add `verify` and `stats`."""
    verify = verbs.add_parser("verify", help="recompute the checksums and counts of a dataset")
    verify.add_argument("folder", type=Path, metavar="DIR")

    stats = verbs.add_parser("stats", help="what a dataset holds")
    stats.add_argument("folder", type=Path, metavar="DIR")
    stats.add_argument("--sequence-length", type=int, default=1024, help="tokens per sample to count with (1024)")


def verify(args: argparse.Namespace, console: Console) -> int:
    """Print a table of the problems of every file; exit code 65 where there are any."""
    from data_pipeline.verify import verify as reports_of

    table = Table("file", "samples", "tokens", "problem")
    num_files = num_samples = num_problems = 0
    unusable: list[str] = []
    with console.status(f"verifying {args.folder}"):
        for report in reports_of(args.folder):
            num_files += 1
            num_samples += report.num_samples
            num_problems += len(report.problems)
            unusable += report.unusable
            for problem in report.problems or ("none",):
                table.add_row(report.name, f"{report.num_samples:,}", f"{report.num_tokens:,}", problem)
    console.print(table)
    if unusable:
        console.print(f"{len(unusable):,} of {num_samples:,} pairs cannot be used; training replaces them:")
        for fault in unusable[:MAX_UNUSABLE_NAMED]:
            console.print(f"  {fault}")
    if num_problems:
        console.print(f"{args.folder}: {num_problems} problems in {num_files} files; do not train on it")
        return ExitCode.DATA
    console.print(f"{args.folder}: {num_files} files, all as the manifest says")
    return ExitCode.DONE


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
