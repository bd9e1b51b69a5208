"""`trainyard data ...`: looks at a corpus, trains a tokenizer, writes, verifies and describes dataset folders."""

import argparse

from rich.console import Console

from pretrain.commands.data import describe, image_text, text

VERBS = {**text.VERBS, **image_text.VERBS, **describe.VERBS}


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the verb `data` and its own verbs."""
    parser = subparsers.add_parser("data", help="prepare and check data", description=__doc__)
    verbs = parser.add_subparsers(dest="data_verb", required=True, metavar="VERB")
    for group in (text, describe, image_text):
        group.add_verbs(verbs)
    return parser


def run(args: argparse.Namespace) -> int:
    """Carry out the verb that was parsed; returns the exit code. Raises TrainyardError."""
    return VERBS[args.data_verb](args, Console(soft_wrap=True, highlight=False, markup=False))
