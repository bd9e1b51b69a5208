"""The console script: finds the verb and runs it."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec

from common.errors import ExitCode
from pretrain.reporting import report

VERBS = {  # verb: what it does; one file each in pretrain/commands, imported only when it is called
    "train": "train on this machine, or join the ranks that a launcher started",
    "plan": "predict memory and speed before a queue wait is spent",
    "rehearse": "build and step one rank of a large job on this machine",
    "selfcheck": "whether the ranks of a launcher could train together",
    "submit": "check, plan and start a job on a cluster",
    "status": "what became of a run",
    "cancel": "end the jobs of a run",
    "data": "prepare and check data",
    "checkpoint": "list, verify and convert checkpoints",
    "prove": "show that a restart or another layout repeats the curve",
    "generate": "continue a text with a trained model",
    "evaluate": "measure a trained model on a dataset",
    "demo": "prepare data, train a small model and look at the result",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit code of the process, see `common.errors.ExitCode`."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = _parse(argv)
    return report(lambda: args.run(args))


def _parse(argv: list[str]) -> argparse.Namespace:
    """The arguments. Overrides may stand before and after options, which argparse alone does not read."""
    parser = _parser(argv[0] if argv else None)
    if not argv:
        parser.print_help(sys.stderr)
        raise SystemExit(ExitCode.USER)
    args, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(args, "overrides") or any(text.startswith("-") for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def _parser(verb: str | None) -> argparse.ArgumentParser:
    """The parser with every verb that is there; only the one called is imported."""
    parser = argparse.ArgumentParser(
        prog="trainyard", description="Pretrains large models on many accelerators.", allow_abbrev=False
    )
    subparsers = parser.add_subparsers(title="verbs", dest="verb", metavar="VERB", required=True)
    for name, text in VERBS.items():
        module = f"pretrain.commands.{name}"
        if find_spec(module) is None:
            continue
        if name == verb:
            command = import_module(module)
            command.add_parser(subparsers)
            subparsers.choices[name].set_defaults(run=command.run)
        else:
            subparsers.add_parser(name, help=text)
    return parser
