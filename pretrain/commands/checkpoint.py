"""`trainyard checkpoint ...`: lists and verifies checkpoints, and takes models to and from transformers folders."""

import argparse
import json
import sys
from pathlib import Path

from common.errors import CheckpointError, ExitCode
from pretrain.checkpoint.locate import require_checkpoints
from pretrain.checkpoint.manifest import damaged_files, read_manifest
from pretrain.commands import checkpoint_hf


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("checkpoint", help="list, verify and convert checkpoints", description=__doc__)
    verbs = parser.add_subparsers(dest="checkpoint_verb", required=True, metavar="VERB")
    listed = verbs.add_parser("list", help="what a run folder keeps, newest first")
    listed.add_argument("folder", metavar="RUN", type=Path, help="a run folder")
    listed.add_argument("--json", action="store_true", help="one JSON list")
    verify = verbs.add_parser("verify", help="hash every file, and see that every tensor is whole")
    verify.add_argument("checkpoint", metavar="CKPT", type=Path, help="a checkpoint, or a run folder for all of its")
    checkpoint_hf.add_verbs(verbs)


def run(args: argparse.Namespace) -> int:
    """Carry out the verb that was parsed; returns the exit code."""
    verbs = {"list": _list, "verify": _verify, "export": checkpoint_hf.export, "import": checkpoint_hf.import_}
    return verbs[args.checkpoint_verb](args)


def _list(args: argparse.Namespace) -> int:
    rows = [_row(folder) for folder in require_checkpoints(args.folder)]
    code = ExitCode.DATA if any("damage" in row for row in rows) else ExitCode.DONE
    if args.json:
        sys.stdout.write(json.dumps(rows, indent=1) + "\n")
        return code
    for row in rows:
        if "damage" in row:
            sys.stdout.write(f"{row['checkpoint']}  {row['damage']}\n")
        else:
            holds = "weights" if row["weights_only"] else "weights and moments"
            sys.stdout.write(f"{row['checkpoint']}  {row['bytes'] / 1e6:>10,.1f} MB  {row['parameters']:>15,} "
                             f"parameters  {holds}, written by {row['world_size']} ranks\n")
    return code


def _row(folder: Path) -> dict:
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return {"checkpoint": folder.name, "damage": str(error)}
    return {"checkpoint": folder.name, "step": manifest["step"], "parameters": manifest["parameters"],
            "world_size": manifest["world_size"], "weights_only": manifest.get("weights_only", False),
            "bytes": sum(entry["bytes"] for entry in manifest["files"])}


def _verify(args: argparse.Namespace) -> int:
    damaged = False
    for folder in require_checkpoints(args.checkpoint):
        problems = _problems(folder)
        damaged |= bool(problems)
        sys.stdout.write(f"{folder.name}  {'damaged' if problems else 'whole'}\n")
        for problem in problems:
            sys.stdout.write(f"  {problem}\n")
    return ExitCode.DATA if damaged else ExitCode.DONE


def _problems(folder: Path) -> list[str]:
    """What is wrong with a checkpoint: its manifest, its files, the tensors in them."""
    from pretrain.checkpoint.reader import Checkpoint

    try:
        return damaged_files(folder, read_manifest(folder)["files"]) or Checkpoint(folder).incomplete()
    except CheckpointError as error:
        return [str(error)]
