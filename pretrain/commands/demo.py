"""`trainyard demo`: from nothing to a trained GPT on this machine, in the verbs that a user would call one by one."""

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path

from pretrain.config import RunConfig, load_config
from pretrain.errors import UserError
from pretrain.shipped import shipped_folder

DATA = Path("data") / "stdlib"
TRAIN_SECONDS = 215.0  # of the four minutes that training may take, what is left after start-up and evaluations
PROMPTS = ("def read_lines(path):\n    ", "class Stack:\n    def __init__(self):\n        ")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("demo", help="prepare data, train a small model, look at the result",
                                   description=__doc__)
    parser.add_argument("--dir", type=Path, default=Path("runs") / "demo-gpt", help="the run folder (runs/demo-gpt)")
    parser.add_argument("--nproc", type=int, default=2, help="ranks on this machine (2)")


def run(args: argparse.Namespace) -> int:
    """Runs each step, saying the command. Returns the exit code of the first that fails, else 0."""
    if args.nproc < 1:
        raise UserError(f"--nproc {args.nproc}: at least 1")
    recipe = shipped_folder("configs") / "gpt" / "tiny.yaml"
    steps = [
        ("a tokenizer from the source of Python's standard library",
         ["data", "tokenizer", "--input", "stdlib", "--vocab-size", "4096", "--to", str(DATA / "tokenizer.model")]),
        *((f"{split} shards", ["data", "shard", "--input", "stdlib", "--split", split, "--tokenizer",
                               str(DATA / "tokenizer.model"), "--to", str(DATA / split)])
          for split in ("train", "heldout")),
    ]
    for what, argv in steps:
        if code := _call(what, argv):
            return code
    overrides = _overrides(args, recipe)
    if code := _call("training", ["train", str(recipe), "--nproc", str(args.nproc), *overrides]):
        return code
    _report(args.dir)
    prompts = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    code = _call("two completions", ["generate", str(args.dir), *prompts, "--max-tokens", "48", "--temperature", "0.6"])
    if not code:
        _say(f"\nrun folder  {args.dir}\ncurve       {args.dir / 'curve.png'}\ncheckpoint  {_newest(args.dir)}\n"
             "next        trainyard train --help; configs/ holds the recipes, README.md the map")
    return code


def _call(what: str, argv: list[str]) -> int:
    _say(f"\n== {what}\n$ trainyard {shlex.join(argv)}")
    return subprocess.run([sys.executable, "-m", "pretrain", *argv], check=False).returncode


def _say(text: str) -> None:
    print(text, flush=True)


def _overrides(args: argparse.Namespace, recipe: Path) -> list[str]:
    """Precision and length that suit this machine; those of the run folder when it has been begun already."""
    begun = args.dir / "config.yaml"
    if begun.exists():
        earlier = load_config(begun)
        return _as_overrides(args, earlier.precision.compute, earlier.run.steps)
    _say("\n== which number format is faster here")
    config = load_config(recipe)
    seconds = {name: _step_seconds(recipe, config, name, args.nproc) for name in ("fp32", "bf16")}
    compute = min(seconds, key=seconds.__getitem__)
    steps = max(40, min(config.run.steps, int(TRAIN_SECONDS / seconds[compute])))
    _say(", ".join(f"{name} {value:.2f} s a step" for name, value in seconds.items())
         + f": taking {compute}, {steps} steps of the recipe's {config.run.steps} fit into four minutes")
    return _as_overrides(args, compute, steps)


def _as_overrides(args: argparse.Namespace, compute: str, steps: int) -> list[str]:
    return [f"run.dir={args.dir}", f"run.steps={steps}", f"precision.compute={compute}", "parallel.zero_stage=1",
            f"schedule.warmup_steps={max(1, steps // 10)}"]


def _step_seconds(recipe: Path, config: RunConfig, compute: str, nproc: int) -> float:
    """Time of one optimizer step, from a forward and backward of one micro-batch on as many threads as a rank gets."""
    threads = max(1, (os.cpu_count() or 1) // nproc)
    argv = [sys.executable, "-m", "pretrain.probe", str(recipe), compute, str(threads)]
    result = subprocess.run(argv, check=True, capture_output=True, text=True)
    micro_batches = config.parallel.global_batch / (config.parallel.micro_batch * nproc)
    return float(result.stdout.splitlines()[-1]) * micro_batches


def _report(folder: Path) -> None:
    """Held-out loss and perplexity before and after."""
    lines = (folder / "evaluations.jsonl").read_text(encoding="utf-8").splitlines()
    first, last = (json.loads(lines[index])["heldout_loss"] for index in (0, -1))
    before, after = math.exp(first), math.exp(last)
    _say(f"\nheld-out loss        {first:.4f} before, {last:.4f} after\n"
         f"held-out perplexity  {before:,.1f} before, {after:,.1f} after: {before / after:,.0f} times lower")


def _newest(folder: Path) -> Path:
    return max((folder / "checkpoints").glob("step-*"), key=lambda path: path.name)
