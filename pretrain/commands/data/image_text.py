"""The verbs of `trainyard data` that write pairs of image and caption: `shapes` draws them, `images` reads files."""

import argparse
from pathlib import Path

from rich.console import Console

from common.errors import ExitCode
from common.wording import count
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
                        help="webdataset tars ({00000..00012} is expanded), folders of them, folders with a .txt or "
                             ".json beside each image, or lists (.csv, .tsv, .jsonl) of image paths and captions")
    images.add_argument("--tokenizer", type=local_path, required=True, metavar="FILE", help="a SentencePiece model")
    images.add_argument("--to", type=local_path, required=True, metavar="DIR", help="the dataset folder to write")
    images.add_argument("--split", default="train", help="name recorded in the manifest (train)")
    images.add_argument("--skip-damaged", action="store_true",
                        help="go on after a damaged tar with what stands before the damage, and name it at the end "
                             "(webdataset's warn_and_continue); without it the first damaged tar ends the conversion")
    images.add_argument("--image-column", metavar="NAME",
                        help="of a list (the first of filepath, file_name, image_path, image, path)")
    images.add_argument("--caption-column", metavar="NAME", help="of a list (the first of caption, title, text)")
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
    """Write the images that have a caption, and say of everything else why it was left out.

    Of an image only the header is decoded; what is wrong behind it is noticed when it is read.
    """
    from data_pipeline.image_text.image_lists import Columns
    from data_pipeline.image_text.pair_writer import write_pairs
    from data_pipeline.image_text.raw_pairs import expand_inputs, inputs_of, raw_pairs
    from data_pipeline.left_out import LeftOut
    from data_pipeline.text.tokenizer import Tokenizer

    left_out = LeftOut()
    inputs, columns = expand_inputs(args.input), Columns(args.image_column, args.caption_column)
    with console.status(f"writing {args.to}"):
        pairs = raw_pairs(inputs, left_out, columns=columns, skip_damaged=args.skip_damaged)
        manifest, is_reused = write_pairs(pairs, Tokenizer.load(args.tokenizer), args.to, split=args.split,
                                          inputs=inputs_of(inputs, columns, args.skip_damaged),
                                          shard_bytes=round(args.shard_mb * MEGABYTE))
    console.print(f"{args.to} is there already, made from the same input: reused" if is_reused else f"wrote {args.to}")
    console.print(f"{manifest.num_pairs:,} pairs, {manifest.size_bytes / MEGABYTE:.1f} MB "
                  f"in {count(len(manifest.shards), 'shard')}")
    for line in (*(f"left out {line}" for line in left_out.lines()), *left_out.remarks()):
        console.print(f"  {line}")
    return ExitCode.DONE


VERBS = {"shapes": shapes, "images": images}
