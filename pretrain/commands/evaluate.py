"""`trainyard evaluate`: measures of a trained model, as JSON.

A model of text: loss, perplexity and bits per byte on a dataset folder or on plain files. A dual encoder: zero-shot
accuracy on a directory with a folder of images per class, retrieval on a dataset folder of image-text pairs.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.errors import ExitCode, UserError

if TYPE_CHECKING:
    from data_pipeline.tokenizer import Tokenizer
    from parallel.megatron import Groups
    from parallel.pipeline import Stage
    from pretrain.config import RunConfig
    from pretrain.evaluation.language import Text


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("evaluate", help="measure a trained model on data", description=__doc__)
    parser.add_argument("checkpoint", metavar="CKPT", type=Path, help="a run folder, or one checkpoint in it")
    parser.add_argument("--data", metavar="PATH", type=Path, required=True, nargs="+",
                        help="a dataset folder; for text also files or folders of .txt .md .py .jsonl; for images also "
                        "a directory with a folder per class")
    parser.add_argument("--samples", type=int, metavar="N", help="only the first N pairs or documents (all)")
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="samples in one forward (32)")
    parser.add_argument("--templates", type=Path, metavar="FILE",
                        help="JSON list of prompts with {} for the class name (the directory's own templates.json)")


def run(args: argparse.Namespace) -> int:
    """Print one JSON object. Returns the exit code."""
    _check(args)
    from pretrain.trained import load_model, load_tokenizer, open_checkpoint, single_rank

    with single_rank() as groups:
        checkpoint = open_checkpoint(args.checkpoint)
        config, stage = load_model(checkpoint, groups)
        tokenizer = load_tokenizer(checkpoint)
        measure = _measure_images if config.spec.reads == "pairs" else _measure_text
        found = measure(args, config, stage, tokenizer, groups)
    told = {"checkpoint": str(checkpoint.folder), "step": checkpoint.manifest["step"],
            "data": [str(path) for path in args.data], "family": config.model.family, **found}
    sys.stdout.write(json.dumps(told, indent=1) + "\n")
    for line in _in_words(found):
        sys.stderr.write(f"{line}\n")
    return ExitCode.DONE


def _in_words(found: dict) -> Iterator[str]:
    """What a person wants to know of the numbers, for the terminal."""
    zero_shot = found.get("zero_shot", {})
    for name, told in {"": zero_shot}.items() if "top1" in zero_shot else zero_shot.items():
        yield (f"zero-shot accuracy {told['top1']:.1%} on {told['num_images']:,} images of {told['num_classes']} "
               f"classes (chance {told['chance']:.1%}){f', {name}' if name else ''}")
    if "perplexity" in found:
        yield (f"loss {found['loss']:.4f}, perplexity {found['perplexity']:.2f}, "
               f"{found['bits_per_byte']:.4f} bits per byte")


def _check(args: argparse.Namespace) -> None:
    for path in (args.checkpoint, *args.data):
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
    for name in ("samples", "batch"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: at least 1")


# -- images -----------------------------------------------------------------------------------------------------------


def _measure_images(args: argparse.Namespace, config: "RunConfig", stage: "Stage", tokenizer: "Tokenizer",
                    groups: "Groups") -> dict:
    from data_pipeline.manifest import MANIFEST_NAME
    from data_pipeline.pairs import PairsDataset
    from pretrain.evaluation.zero_shot import DualEncoder, classification, retrieval, templates_of

    model = DualEncoder(stage, tokenizer, config.model.image_size, config.model.sequence_length, args.batch)
    found: dict = {}
    for path in args.data:
        if not path.is_dir():
            raise UserError(f"{path} is a file; give a directory with a folder per class, or a dataset folder of pairs")
        if (path / MANIFEST_NAME).exists():
            dataset = PairsDataset.open(path, config.model.image_size)
            found.setdefault("retrieval", {})[str(path)] = retrieval(model, dataset, args.samples)
        else:
            templates = templates_of(path, args.templates)
            found.setdefault("zero_shot", {})[str(path)] = classification(model, path, templates)
    return {kind: next(iter(by_path.values())) if len(by_path) == 1 else by_path for kind, by_path in found.items()}


# -- text -------------------------------------------------------------------------------------------------------------


def _measure_text(args: argparse.Namespace, config: "RunConfig", stage: "Stage", tokenizer: "Tokenizer",
                  groups: "Groups") -> dict:
    from parallel.megatron import TensorShard
    from pretrain.evaluation.language import language_measures, stream_batches, summed_loss
    from pretrain.objectives import make_loss

    device = next(stage.parameters()).device
    text = _text(args, tokenizer)
    objective = make_loss("causal_lm", config.model.family, TensorShard(groups, device))
    batches = stream_batches(text, config.model.sequence_length, args.batch, device)
    nats, num_tokens = summed_loss(stage, objective, batches)
    if not num_tokens:
        raise UserError(f"{', '.join(map(str, args.data))}: no text to evaluate on")
    return language_measures(nats, num_tokens, text.text_bytes)


def _text(args: argparse.Namespace, tokenizer: "Tokenizer") -> "Text":
    """The documents of a dataset folder, or of files, as token ids of the model's own tokenizer."""
    from data_pipeline.corpus import documents
    from data_pipeline.index import TokenDataset
    from data_pipeline.manifest import MANIFEST_NAME
    from pretrain.evaluation.language import Text

    folder = args.data[0]
    if len(args.data) == 1 and (folder / MANIFEST_NAME).exists():
        dataset = TokenDataset.open(folder)
        if dataset.manifest.tokenizer.sha256 != tokenizer.sha256:
            raise UserError(f"{folder} was made with another tokenizer than the model's: give the text itself, or "
                            "write the dataset again with the tokenizer in the checkpoint")
        count = min(args.samples or len(dataset), len(dataset))
        whole = count == len(dataset)
        kept = [dataset.tokens(number).tolist() for number in range(count)]
        num_bytes = dataset.manifest.text_bytes if whole else sum(len(tokenizer.decode(ids).encode()) for ids in kept)
        return Text(kept, num_bytes, tokenizer.end_of_text)
    texts = [document.text for document in documents([str(path) for path in args.data])][: args.samples]
    encoded = [[*tokenizer.encode(text), tokenizer.end_of_text] for text in texts]
    return Text(encoded, sum(len(text.encode("utf-8")) for text in texts), tokenizer.end_of_text)
