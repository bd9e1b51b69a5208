"""`trainyard generate`: continue a text with a trained model."""

import argparse
import sys
from contextlib import redirect_stdout
from pathlib import Path

from common.errors import ExitCode, UserError
from pretrain.models import families_with


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("generate", help="continue a text with a trained model", description=__doc__)
    parser.add_argument("checkpoint", metavar="CKPT", type=Path,
                        help="a run folder, one checkpoint in it, or a transformers folder")
    parser.add_argument("--prompt", action="append", required=True, metavar="TEXT", help="text to continue; repeatable")
    parser.add_argument("--max-tokens", type=int, default=64, help="longest continuation in tokens (64)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the most likely token (0.8)")
    parser.add_argument("--top-k", type=int, default=0, help="choose among the k most likely tokens; 0: all (0)")
    parser.add_argument("--top-p", type=float, default=0.95, help="choose within this probability mass (0.95)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same text (0)")


def run(args: argparse.Namespace) -> int:
    """Print each prompt with its continuation, as it is made. Returns the exit code."""
    _check(args)
    with redirect_stdout(sys.stderr):  # libraries print when they are loaded, and standard output is for the text
        from parallel.single_rank import single_rank
        from pretrain.inference.generation import Sampling, continue_tokens
        from pretrain.inference.trained_model import open_model

    with single_rank() as groups:
        trained = open_model(args.checkpoint, groups)
        if trained.spec.generation != "continuation":
            raise UserError(f"{args.checkpoint} holds a model of the family {trained.model.family}, which does not "
                            f"continue texts: generate takes a decoder ({families_with(generation='continuation')})")
        tokenizer = trained.tokenizer
        sampling = Sampling(args.temperature, args.top_k, args.top_p)
        context = trained.model.sequence_length
        for number, text in enumerate(args.prompt):
            prompt = tokenizer.encode(text) or [tokenizer.end_of_text]
            if len(prompt) >= context:
                raise UserError(f"--prompt: {len(prompt)} tokens, and the model's context is {context}: shorten it to "
                                f"at most {context - 1}")
            tokens, shown = list(prompt), tokenizer.decode(prompt)
            sys.stdout.write(("\n\n" if number else "") + shown)
            stop = tokenizer.end_of_text
            for token in continue_tokens(trained.stage, prompt, args.max_tokens, context, sampling=sampling,
                                         stop_token=stop, seed=args.seed):
                tokens.append(token)
                whole = tokenizer.decode(tokens)
                if not whole.endswith("\ufffd"):  # the bytes of a character may be several tokens
                    sys.stdout.write(whole[len(shown):])
                    sys.stdout.flush()
                    shown = whole
        sys.stdout.write("\n")
    return ExitCode.DONE


def _check(args: argparse.Namespace) -> None:
    if args.max_tokens < 1:
        raise UserError(f"--max-tokens {args.max_tokens}: at least 1")
    if args.temperature < 0:
        raise UserError(f"--temperature {args.temperature}: 0 (greedy) or above")
    if args.top_k < 0:
        raise UserError(f"--top-k {args.top_k}: 0 (all tokens) or above")
    if not 0 < args.top_p <= 1:
        raise UserError(f"--top-p {args.top_p}: above 0 and at most 1")
    if not args.checkpoint.exists():
        raise UserError(f"{args.checkpoint}: no such folder. Give a run folder, or one of its checkpoints")
