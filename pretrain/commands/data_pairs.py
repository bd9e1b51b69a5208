"""The verbs of `trainyard data` on pairs of image and caption: `shapes` draws them, `images` takes what is there, and
`stats` describes a folder of them."""

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from common.errors import ExitCode

MEGABYTE = 1e6
MAX_LOOKED_AT = 1000


def add_verbs(verbs: argparse._SubParsersAction) -> None:
    """Add `shapes` and `images`."""
    shapes = verbs.add_parser("shapes", help="draw captioned scenes to train and test a CLIP on")
    shapes.add_argument("--to", type=Path, required=True, metavar="DIR",
                        help="gets `train` and `heldout` (dataset folders) and `zero-shot` (a folder per class)")
    shapes.add_argument("--num-train", type=int, default=12_000, metavar="N", help="scenes to train on (12000)")
    shapes.add_argument("--num-test", type=int, default=480, metavar="M",
                        help="scenes, and as many zero-shot images, of combinations that training never shows (480)")
    shapes.add_argument("--seed", type=int, default=0, metavar="S", help="the same seed draws the same (0)")
    shapes.add_argument("--size", type=int, default=64, help="height and width in pixels (64)")

    images = verbs.add_parser("images", help="write a dataset folder of images with captions")
    images.add_argument("--input", nargs="+", type=Path, required=True, metavar="PATH",
                        help="webdataset tars, folders of them, or folders with a .txt or .json beside each image")
    images.add_argument("--tokenizer", type=Path, required=True, metavar="FILE", help="a SentencePiece model")
    images.add_argument("--to", type=Path, required=True, metavar="DIR", help="the dataset folder to write")
    images.add_argument("--split", default="train", help="name recorded in the manifest (train)")
    images.add_argument("--shard-mb", type=float, default=256.0, help="megabytes per shard (256)")


def shapes(args: argparse.Namespace, console: Console) -> int:
    """Draw, or reuse what was drawn with the same settings."""
    from data_pipeline.image_text.synthetic_shapes import HELD_OUT, SEEN, write_shapes

    with console.status("drawing"):
        folders = write_shapes(args.to, args.num_train, args.num_test, args.seed, args.size)
    console.print(f"{len(SEEN)} combinations of colour and shape to train on, {len(HELD_OUT)} held out: "
                  f"{args.num_train:,} scenes to train on, {args.num_test:,} and as many zero-shot images to test")
    for folder in folders:
        console.print(f"  {folder}")
    return ExitCode.DONE


def images(args: argparse.Namespace, console: Console) -> int:
    """Write what has an image and a caption; whether an image can be decoded is found out when it is read."""
    from data_pipeline.image_text.pair_writer import inputs_of, raw_pairs, write_pairs
    from data_pipeline.text.tokenizer import Tokenizer

    lonely: list[str] = []
    with console.status(f"writing {args.to}"):
        manifest, is_reused = write_pairs(raw_pairs(args.input, lonely.append), Tokenizer.load(args.tokenizer), args.to,
                                          args.split, inputs_of(args.input), round(args.shard_mb * MEGABYTE))
    console.print(f"{args.to} is there already, made from the same input: reused" if is_reused else f"wrote {args.to}")
    console.print(f"{manifest.num_pairs:,} pairs, {manifest.size_bytes / MEGABYTE:.1f} MB "
                  f"in {len(manifest.shards)} shards")
    if lonely:
        console.print(f"  left out {len(lonely):,} images without a caption, first: {lonely[0]}")
    return ExitCode.DONE


def stats(args: argparse.Namespace, console: Console) -> int:
    """Describe a folder of pairs; sizes of images and captions are those of its first pairs."""
    import numpy as np

    from data_pipeline.image_text.images import BadImage, decode
    from data_pipeline.image_text.pair_dataset import BadPair, PairsDataset

    dataset = PairsDataset.open(args.folder)
    manifest = dataset.manifest
    looked_at = min(len(dataset), MAX_LOOKED_AT)
    sides, lengths = [], []
    for number in range(looked_at):
        try:
            pair = dataset.pair(number)
            sides.append(min(decode(pair.image).size))
            lengths.append(len(dataset.tokenizer.encode(pair.caption)))
        except (BadPair, BadImage):
            continue
    table = Table(show_header=False)
    rows = [("folder", str(args.folder)), ("split", manifest.split), ("pairs", f"{manifest.num_pairs:,}"),
            ("shards", f"{len(manifest.shards)}, {manifest.size_bytes / MEGABYTE:.1f} MB"),
            ("vocabulary", f"{manifest.vocab_size:,}, end-of-text is {manifest.end_of_text}"),
            ("tokenizer", f"{manifest.tokenizer.file}, SHA-256 {manifest.tokenizer.sha256[:16]}...")]
    for name, found in (("shorter side of images", sides), ("tokens of captions", lengths)):
        if found:
            least, median, most = np.percentile(found, (0, 50, 100))
            rows.append((name, f"{least:,.0f} least, {median:,.0f} median, {most:,.0f} most"))
    rows.append(("usable", f"{len(sides):,} of the first {looked_at:,}"))
    for row in rows:
        table.add_row(*row)
    console.print(table)
    return ExitCode.DONE
