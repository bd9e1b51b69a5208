"""`trainyard demo`: from nothing to a trained model on this machine, in the verbs that a user would call one by one."""

import argparse
import json
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from common.errors import UserError
from common.files import writing
from common.shipped_files import shipped_folder
from pretrain.checkpoint.locate import require_checkpoints
from pretrain.config.run_config import RunConfig, load_config

DATA = Path("data") / "stdlib"
SHAPES = Path("data") / "shapes"
# What forward and backward may take of the four minutes for training; the rest is start-up, communication, evaluation
# and the doubt of a short measurement.
TRAIN_SECONDS = 150.0
MIN_STEPS = 40
PROMPTS = ("def read_lines(path):\n    ", "class Stack:\n    def __init__(self):\n        ")
NUM_EXAMPLES, NUM_SPANS = 3, 3
MARGIN_CHARACTERS = 60  # of the source around the spans that are shown

Step = tuple[str, list[str]]  # what is done, and the arguments of `trainyard`

STDLIB: tuple[Step, ...] = (
    ("a tokenizer from the source of Python's standard library",
     ["data", "tokenizer", "--input", "stdlib", "--vocab-size", "4096", "--to", str(DATA / "tokenizer.model")]),
    *((f"{split} shards", ["data", "shard", "--input", "stdlib", "--split", split, "--tokenizer",
                           str(DATA / "tokenizer.model"), "--to", str(DATA / split)])
      for split in ("train", "heldout")),
)
DRAWN: tuple[Step, ...] = (
    ("captioned shapes", ["data", "shapes", "--to", str(SHAPES), "--num-train", "12000", "--num-test", "480"]),)


@dataclass(frozen=True)
class Demo:
    """What one family shows.

    Args:
        recipe: under `configs/`.
        prepare: makes its data.
        show: what is done with the trained model in the run folder; returns an exit code.
        overrides: of the recipe, on two ranks.
        is_timed: whether number format and steps are chosen to fit this machine; else the recipe's are taken.
    """

    recipe: str
    prepare: tuple[Step, ...]
    show: Callable[[Path], int]
    overrides: tuple[str, ...] = ()
    _: KW_ONLY
    is_timed: bool = True


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("demo", help="prepare data, train a small model, look at the result",
                                   description=__doc__)
    parser.add_argument("family", nargs="?", choices=DEMOS, default="gpt", help="gpt continues prompts, t5 fills in "
                        "hidden spans, clip names shapes that it never saw together (gpt)")
    parser.add_argument("--dir", type=Path, help="the run folder (runs/demo-FAMILY)")
    parser.add_argument("--nproc", type=int, default=2, help="ranks on this machine (2)")


def run(args: argparse.Namespace) -> int:
    """Runs each step, saying the command. Returns the exit code of the first that fails, else 0."""
    if args.nproc < 1:
        raise UserError(f"--nproc {args.nproc}: at least 1")
    demo = DEMOS[args.family]
    folder = args.dir or Path("runs") / f"demo-{args.family}"
    recipe = shipped_folder("configs") / demo.recipe
    with writing(folder):  # before minutes are spent on data
        folder.mkdir(parents=True, exist_ok=True)
    for what, argv in demo.prepare:
        if code := _call(what, argv):
            return code
    overrides = [f"run.dir={folder}", *demo.overrides]
    if demo.is_timed:
        overrides += _timed(demo, folder, recipe, args.nproc)
    if code := _call("training", ["train", str(recipe), "--nproc", str(args.nproc), *overrides]):
        return code
    if code := demo.show(folder):
        return code
    _say(f"\nrun folder  {folder}\ncurve       {folder / 'curve.png'}\ncheckpoint  {require_checkpoints(folder)[0]}\n"
         "next        trainyard train --help; configs/ holds the recipes, README.md the map")
    return 0


def _call(what: str, argv: list[str]) -> int:
    return _called(what, argv).returncode


def _called(what: str, argv: list[str], stdout: int | None = None) -> subprocess.CompletedProcess[str]:
    _say(f"\n== {what}\n$ trainyard {shlex.join(argv)}")
    return subprocess.run([sys.executable, "-m", "pretrain", *argv], check=False, stdout=stdout, text=True)


def _say(text: str) -> None:
    print(text, flush=True)


# -- how long ----------------------------------------------------------------------------------------------------------


def _timed(demo: Demo, folder: Path, recipe: Path, nproc: int) -> list[str]:
    """Precision and length that suit this machine; those of the run folder when it has been begun already."""
    begun = folder / "config.yaml"
    if begun.exists():
        earlier = load_config(begun)
        return _as_overrides(earlier.precision.compute, earlier.run.steps)
    _say("\n== which number format is faster here")
    config = load_config(recipe, demo.overrides)
    seconds = {name: _step_seconds(demo, recipe, config, compute=name, nproc=nproc) for name in ("fp32", "bf16")}
    compute = min(seconds, key=seconds.__getitem__)
    steps = max(MIN_STEPS, min(config.run.steps, int(TRAIN_SECONDS / seconds[compute])))
    _say(", ".join(f"{name} {value:.2f} s a step" for name, value in seconds.items())
         + f": taking {compute}, {steps} steps of the recipe's {config.run.steps} fit into four minutes")
    return _as_overrides(compute, steps)


def _as_overrides(compute: str, steps: int) -> list[str]:
    return [f"run.steps={steps}", f"precision.compute={compute}", "parallel.zero_stage=1",
            f"schedule.warmup_steps={max(1, steps // 10)}"]


def _step_seconds(demo: Demo, recipe: Path, config: RunConfig, *, compute: str, nproc: int) -> float:
    """Time of one optimizer step, from a forward and backward of one micro-batch on as many threads as a rank gets."""
    threads = max(1, (os.cpu_count() or 1) // nproc)
    argv = [sys.executable, "-m", "pretrain.training.micro_batch_timing", str(recipe), compute, str(threads),
            *demo.overrides]
    result = subprocess.run(argv, check=True, capture_output=True, text=True)
    micro_batches = config.parallel.global_batch / (config.parallel.micro_batch * nproc)
    return float(result.stdout.splitlines()[-1]) * micro_batches


# -- what is shown -----------------------------------------------------------------------------------------------------


def _before_and_after(folder: Path) -> None:
    """Held-out loss and perplexity before and after."""
    lines = (folder / "evaluations.jsonl").read_text(encoding="utf-8").splitlines()
    first, last = (json.loads(lines[index])["heldout_loss"] for index in (0, -1))
    before, after = math.exp(first), math.exp(last)
    _say(f"\nheld-out loss        {first:.4f} before, {last:.4f} after\n"
         f"held-out perplexity  {before:,.1f} before, {after:,.1f} after: {before / after:,.0f} times lower")


def _completions(folder: Path) -> int:
    _before_and_after(folder)
    prompts = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    return _call("two completions", ["generate", str(folder), *prompts, "--max-tokens", "48", "--temperature", "0.6"])


def _filled_spans(folder: Path) -> int:
    _before_and_after(folder)
    argv = ["evaluate", str(folder), "--data", str(DATA / "heldout"), "--samples", "64", "--examples",
            str(NUM_EXAMPLES)]
    done = _called("hidden spans of held-out code, filled in", argv, stdout=subprocess.PIPE)
    if done.returncode == 0:
        for example in json.loads(done.stdout)["examples"]:
            _say("\n".join(_example_lines(example)))
    return done.returncode


def _example_lines(example: dict[str, str]) -> list[str]:
    """The source around its first spans; for each of them what it hides, and what the model wrote."""
    places = [match.span() for match in re.finditer(r"<extra_id_\d+>", example["source"])][:NUM_SPANS]
    start, stop = max(0, places[0][0] - MARGIN_CHARACTERS), places[-1][1] + MARGIN_CHARACTERS
    lines = ["", *(f"  | {line}" for line in example["source"][start:stop].splitlines())]
    truth, answer = _spans(example["truth"]), _spans(example["answer"])
    for first, last in places:
        name = example["source"][first:last]
        lines.append(f"  {name}  hidden {truth.get(name, '')!r}, filled in {answer.get(name, '')!r}")
    return lines


def _spans(text: str) -> dict[str, str]:
    """What follows each sentinel; of a repeated one the first."""
    parts = re.split(r"(<extra_id_\d+>)", text)
    return dict(reversed(list(zip(parts[1::2], parts[2::2], strict=True))))


def _named_shapes(folder: Path) -> int:
    argv = ["evaluate", str(folder), "--data", str(SHAPES / "zero-shot"), str(SHAPES / "heldout")]
    return _call("combinations of colour and shape that training never showed", argv)


DEMOS = {
    "gpt": Demo("gpt/tiny.yaml", STDLIB, _completions),
    "t5": Demo("t5/tiny.yaml", STDLIB, _filled_spans, ("parallel.micro_batch=8",)),
    "clip": Demo("clip/tiny.yaml", DRAWN, _named_shapes, ("parallel.micro_batch=64",), is_timed=False),
}
