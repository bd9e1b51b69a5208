"""The verbs of `trainyard data` that write pairs of image and caption: `shapes` draws them, `images` reads files."""

import argparse
from pathlib import Path

from rich.console import Console

from common.errors import ExitCode
from pretrain.commands.arguments import local_path
from pretrain.commands.data.describe import MEGABYTE


def add_verbs(verbs: argparse._SubParsersAction) -> None:
    """Add `shapes` and `images`."""
    shapes = verbs.add_parser("shapes", help="draw captioned scenes to train and test a CLIP on")
    shapes.add_argument("--to", type=local_path, required=True, metavar="DIR",
                        help="gets `train` and `heldout` (dataset folders) and `zero-shot` (a folder per class)")
    shapes.add_argument("--num-train", type=int, default=12_000, metavar="N", help="scenes to train on (12000)")
    shapes.add_argument("--num-test", type=int, default=480, metavar="M",
                        help="scenes, and as many zero-shot images, of combinations that training never shows (480)")
    shapes.add_argument("--seed", type=int, default=0, metavar="S", help="the same seed draws the same (0)")
    shapes.add_argument("--size", type=int, default=64, help="height and width in pixels (64)")

    images = verbs.add_parser("images", help="write a dataset folder of images with captions")
    images.add_argument("--input", nargs="+", type=Path, required=True, metavar="PATH",
                        help="webdataset tars, folders of them, or folders with a .txt or .json beside each image")
    images.add_argument("--tokenizer", type=local_path, required=True, metavar="FILE", help="a SentencePiece model")
    images.add_argument("--to", type=local_path, required=True, metavar="DIR", help="the dataset folder to write")
    images.add_argument("--split", default="train", help="name recorded in the manifest (train)")
    images.add_argument("--shard-mb", type=float, default=256.0, help="megabytes per shard (256)")


def shapes(args: argparse.Namespace, console: Console) -> int:
    """Draw, or reuse what was drawn with the same settings."""
    from data_pipeline.image_text.synthetic_shapes import HELD_OUT, SEEN, write_shapes

    with console.status("drawing"):
        folders = write_shapes(args.to, num_train=args.num_train, num_test=args.num_test, seed=args.seed,
                               size=args.size)
    console.print(f"{len(SEEN)} combinations of colour and shape to train on, {len(HELD_OUT)} held out: "
                  f"{args.num_train:,} scenes to train on, {args.num_test:,} and as many zero-shot images to test")
    for folder in folders:
        console.print(f"  {folder}")
    return ExitCode.DONE


def images(args: argparse.Namespace, console: Console) -> int:
    """Write the images that have a caption; an image that cannot be decoded is noticed when it is read."""
    from data_pipeline.image_text.pair_writer import inputs_of, raw_pairs, write_pairs
    from data_pipeline.text.tokenizer import Tokenizer

    uncaptioned: list[str] = []
    with console.status(f"writing {args.to}"):
        pairs = raw_pairs(args.input, on_uncaptioned=uncaptioned.append)
        manifest, is_reused = write_pairs(pairs, Tokenizer.load(args.tokenizer), args.to, split=args.split,
                                          inputs=inputs_of(args.input), shard_bytes=round(args.shard_mb * MEGABYTE))
    console.print(f"{args.to} is there already, made from the same input: reused" if is_reused else f"wrote {args.to}")
    console.print(f"{manifest.num_pairs:,} pairs, {manifest.size_bytes / MEGABYTE:.1f} MB "
                  f"in {len(manifest.shards)} shards")
    if uncaptioned:
        console.print(f"  left out {len(uncaptioned):,} images without a caption, first: {uncaptioned[0]}")
    return ExitCode.DONE


VERBS = {"shapes": shapes, "images": images}
