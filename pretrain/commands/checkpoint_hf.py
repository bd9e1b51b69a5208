"""`trainyard checkpoint export` and `import`: to and from the folders of transformers."""

import argparse
import re
import sys
from pathlib import Path

from common.errors import ExitCode
from common.number_formats import NUMBER_FORMATS
from pretrain.commands.arguments import local_path

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def add_verbs(verbs: argparse._SubParsersAction) -> None:
    """The two verbs of conversion."""
    export = verbs.add_parser("export", help="write a transformers folder, and prove it", description="Writes "
                              "config.json, safetensors files, the tokenizer and certificate.json, which holds the "
                              "largest difference of logits between the training model and transformers.")
    export.add_argument("checkpoint", metavar="CKPT", type=Path, help="a run folder, or one checkpoint in it")
    export.add_argument("--to", metavar="DIR", type=local_path, required=True,
                        help="the folder to write; it must not exist")
    export.add_argument("--dtype", choices=NUMBER_FORMATS, default="fp32", help="number format of the weights (fp32)")
    export.add_argument("--architecture", metavar="NAME", help="the model_type to write, where several fit (the first)")
    export.add_argument("--no-tokenizer", action="store_true", help="leave the tokenizer's files out")
    export.add_argument("--no-certificate", action="store_true", help="do not measure: for a model that is too large "
                        "for one machine; certificate.json then records that")
    read = verbs.add_parser("import", help="make a checkpoint of a transformers folder", description="Writes a run "
                            "folder with one checkpoint (weights only) and a config.yaml that starts from it.")
    read.add_argument("folder", metavar="HF_DIR", type=Path, help="a folder with config.json and safetensors files")
    read.add_argument("--to", metavar="DIR", type=local_path, required=True, help="the run folder to write; a new one")
    for parser in (export, read):
        parser.add_argument("--shard-size", metavar="SIZE", default="2GB", type=_bytes,
                            help="most bytes of one file, as 500MB or 2GB (2GB)")


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+)(KB|MB|GB)", text)
    if not match or not int(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no size: a number and KB, MB or GB, as 2GB")
    return int(match[1]) * UNITS[match[2]]


def export(args: argparse.Namespace) -> int:
    """Write the folder and print the largest difference that was measured. Returns the exit code."""
    from pretrain.hf.conversion import NOT_MEASURED
    from pretrain.hf.conversion import export as write

    done = write(args.checkpoint, args.to, architecture=args.architecture, dtype=args.dtype,
                 file_bytes=args.shard_size, with_tokenizer=not args.no_tokenizer,
                 is_measured=not args.no_certificate)
    differences, bound = done.certificate["largest_differences"], done.certificate.get("bound")
    measured = f"{max(differences.values()):.2g}, at most {bound:.2g}" if differences else NOT_MEASURED
    sys.stdout.write(f"{args.to}: {done.class_name} of step {done.step}\n"
                     f"largest difference of logits: {measured}\n")
    return ExitCode.DONE


def import_(args: argparse.Namespace) -> int:
    """Write the run folder and print how to train on. Returns the exit code."""
    from pretrain.hf.conversion import import_folder

    done = import_folder(args.folder, args.to, file_bytes=args.shard_size)
    sys.stdout.write(f"{done.checkpoint}: {done.model_type} as the family {done.family}, "
                     f"{done.num_parameters:,} parameters\n")
    for note in done.notes:
        sys.stdout.write(f"note: {note}\n")
    sys.stdout.write(f"to go on training: trainyard train {args.to / 'config.yaml'} run.dir=... data.train=...\n")
    return ExitCode.DONE
