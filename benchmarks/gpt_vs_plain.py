"""Tokens per second of `trainyard train` with one rank against a plain PyTorch loop, side by side in one run.

    python benchmarks/gpt_vs_plain.py [--config configs/gpt/tiny.yaml] [--rounds 3] [--steps 20] [section.key=value ...]

Runs the two in turn, `rounds` times, and prints the ratio of their median speeds over all steps but the first five of
each run. The number only counts when both computed the same thing, so their losses are compared first.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

WARM_UP_STEPS = 5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/gpt/tiny.yaml")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args()
    speeds: dict[str, list[float]] = {"trainyard": [], "plain loop": []}
    worst = 0.0
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(args.rounds):
            ours = run_ours(args, Path(scratch) / f"ours-{number}")
            plain = run_plain(args, Path(scratch) / f"plain-{number}.jsonl")
            worst = max(worst, *(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(ours, plain, strict=True)))
            speeds["trainyard"] += [r["tokens_per_second"] for r in ours[WARM_UP_STEPS:]]
            speeds["plain loop"] += [r["tokens_per_second"] for r in plain[WARM_UP_STEPS:]]
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    ratio = medians["trainyard"] / medians["plain loop"]
    result = {"ratio": ratio, "largest_relative_loss_difference": worst, "cores": os.cpu_count(),
              "tokens_per_second": medians, "steps": args.steps, "rounds": args.rounds}
    if args.json:
        print(json.dumps(result))
    else:
        for name, values in speeds.items():
            low, middle, high = statistics.quantiles(values, n=4)
            print(f"{name:<12} {middle:10,.0f} tokens/s   quartiles {low:,.0f} to {high:,.0f}")
        print(f"ratio        {ratio:10.3f}   largest relative difference of a loss {worst:.1e}")
    return 0 if worst < 1e-3 else 1


def run_ours(args: argparse.Namespace, folder: Path) -> list[dict]:
    command = [sys.executable, "-m", "pretrain", "train", args.config, "--nproc", "1", f"run.dir={folder}",
               "log.evaluate_every=0", "checkpoint.every=0", f"run.steps={args.steps}", *args.overrides]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return read(folder / "metrics.jsonl")


def run_plain(args: argparse.Namespace, metrics: Path) -> list[dict]:
    command = [sys.executable, str(Path(__file__).with_name("gpt_plain_loop.py")), args.config, str(metrics),
               str(args.steps), f"run.steps={args.steps}", *args.overrides]
    subprocess.run(command, check=True)
    return read(metrics)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    sys.exit(main())
