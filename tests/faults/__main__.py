"""`python -m tests.faults`: runs the rows of the fault matrix, prints a table, writes faults.json; 1 when one fails."""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from tests.faults.bench import Bench, Trial
from tests.faults.rows import ROWS, Row
from tests.helpers.recipes import write_drawn_dataset, write_recipe
from tests.helpers.slurm import local_slurm, why_not

LINE = "{:<5} {:<58} {:<54} {:>7} {:>8}\n"


def main(argv: Sequence[str]) -> int:
    """Returns 1 when a trial failed, 2 when a row cannot run here."""
    args = _arguments(argv)
    names = args.rows.split(",") if args.rows else [row.name for row in ROWS]
    unknown = sorted(set(names) - {row.name for row in ROWS})
    if unknown:
        sys.stderr.write(f"no such rows: {', '.join(unknown)}; there are {', '.join(row.name for row in ROWS)}\n")
        return 2
    rows = [row for row in ROWS if row.name in names]
    needs_slurm = any(row.slurm for row in rows)
    if needs_slurm and why_not():
        sys.stderr.write(f"{why_not()}\nor choose rows without Slurm: "
                         f"--rows {','.join(row.name for row in rows if not row.slurm)}\n")
        return 2
    seed = args.seed if args.seed is not None else random.SystemRandom().randrange(10**6)
    folder = Path(tempfile.mkdtemp(prefix="trainyard-faults-"))
    sys.stdout.write(f"seed {seed}\n" + LINE.format("row", "fault", "expected", "passed", "seconds"))
    recipe = write_recipe(folder / "gpt.yaml", write_drawn_dataset(folder / "data"))
    with local_slurm(nodes=3, cpus=4) if needs_slurm else nullcontext() as cluster:
        bench, results = Bench(recipe, folder, cluster), []
        for row in rows:
            results.append(run_row(bench, row, min(args.trials or row.trials, row.trials), seed))
            args.to.write_text(json.dumps({"seed": seed, "rows": results}, indent=1) + "\n")
    failed = [result for result in results if result["passed"] < result["trials"]]
    if failed:
        sys.stdout.write(f"what the failed trials left is in {folder}\n")
    else:
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if failed else 0


def run_row(bench: Bench, row: Row, num_trials: int, seed: int) -> dict[str, Any]:
    """Runs the trials of one row; returns its line of faults.json."""
    started = time.monotonic()
    with ThreadPoolExecutor(row.at_once) as pool:
        trials = list(pool.map(lambda number: run_trial(bench, row, number, seed), range(num_trials)))
    passed = sum("failure" not in trial for trial in trials)
    result = {"row": row.name, "fault": row.fault, "expected": row.expected, "trials": num_trials, "passed": passed,
              "seconds": round(time.monotonic() - started, 1), "results": trials}
    sys.stdout.write(LINE.format(row.name, row.fault, row.expected, f"{passed}/{num_trials}",
                                 f"{result['seconds']:.0f}"))
    for trial in trials:
        if "failure" in trial:
            lines = [line.strip() for line in trial["failure"].splitlines() if not set(line) <= set(" ^~")]
            where, message = lines[-2:]
            sys.stdout.write(f"      trial {trial['trial']}: {where[:160]}: {message[:300]}\n")
    sys.stdout.flush()
    return result


def run_trial(bench: Bench, row: Row, number: int, seed: int) -> dict[str, Any]:
    """One trial, which the same seed repeats; returns what it measured, and under `failure` why it failed."""
    started = time.monotonic()
    trial = Trial(number, random.Random(f"{seed} {row.name} {number}").randrange(10**9),
                  bench.folder / f"{row.name}-{number}")
    outcome: dict[str, Any] = {"trial": number}
    try:
        row.run(bench, trial)
    except Exception:
        outcome["failure"] = traceback.format_exc()[-4000:]
    else:
        shutil.rmtree(trial.folder, ignore_errors=True)
    return {**outcome, "seconds": round(time.monotonic() - started, 1), **trial.facts}


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", allow_abbrev=False)
    parser.add_argument("--rows", help="such as F3,F8 (default: all)")
    parser.add_argument("--trials", type=int, help="at most so many of each row")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--to", type=Path, default=Path("faults.json"))
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
