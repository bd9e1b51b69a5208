"""`trainyard evaluate`: measures of a trained model, as JSON.

Text, on a dataset folder or on plain files: loss, perplexity and bits per byte of a decoder; for other models the loss
of the tokens that their objective corrupts, the same ones every time. A dual encoder: zero-shot accuracy on a directory
with a folder of images per class, retrieval on a dataset folder of image-text pairs.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from common.errors import ExitCode, UserError
from pretrain.models import families_with

if TYPE_CHECKING:
    from data_pipeline.tokens.in_memory_dataset import TextDataset
    from data_pipeline.tokens.token_dataset import TokenDataset
    from parallel.process_groups import Groups
    from pretrain.inference.language import Text
    from pretrain.inference.trained_model import Trained
    from pretrain.models.family import ImageTextModel

SECONDS_BETWEEN_LINES = 10.0


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("evaluate", help="measure a trained model on data", description=__doc__)
    parser.add_argument("checkpoint", metavar="CKPT", type=Path,
                        help="a run folder, one checkpoint in it, or a transformers folder")
    parser.add_argument("--data", metavar="PATH", type=Path, required=True, nargs="+",
                        help="a dataset folder; for text also files or folders of .txt .md .py .jsonl; for images also "
                        "a directory with a folder per class")
    parser.add_argument("--field", default="text", metavar="NAME",
                        help="the field of a record (.jsonl, .json, .parquet) that holds its text (text)")
    parser.add_argument("--samples", type=int, metavar="N", help="only the first N pairs, documents of a decoder, or "
                        "samples of another model of text (all)")
    parser.add_argument("--sequence-length", type=int, metavar="N", help="tokens that a decoder sees at once, at most "
                        "those of its training (as many)")
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="samples in one forward (32)")
    parser.add_argument("--examples", type=int, default=0, metavar="N", help="also the greedy answers of an "
                        "encoder-decoder to the first N samples (0)")
    parser.add_argument("--templates", type=Path, metavar="FILE",
                        help="JSON list of prompts with {} for the class name (the directory's own templates.json)")


def run(args: argparse.Namespace) -> int:
    """Print one JSON object. Returns the exit code."""
    _check(args)
    with redirect_stdout(sys.stderr):  # libraries print there, and standard output is for the JSON
        found = _measured(args)
    sys.stdout.write(json.dumps(found, indent=1) + "\n")
    for line in _lines(found):
        sys.stderr.write(f"{line}\n")
    return ExitCode.DONE


def _measured(args: argparse.Namespace) -> dict:
    from parallel.single_rank import single_rank
    from pretrain.inference.trained_model import open_model

    with single_rank() as groups:
        trained = open_model(args.checkpoint, groups)
        _check_for(args, trained)
        measure = {"zero_shot": _zero_shot, "language": _language, "masked_quality": _masked_quality}
        found = measure[trained.spec.evaluation](args, trained, groups)
    return {"checkpoint": str(trained.folder), "step": trained.step, "data": [str(path) for path in args.data],
            "family": trained.model.family, **found}


def _lines(found: dict) -> Iterator[str]:
    """The main numbers as lines for a person."""
    zero_shot = found.get("zero_shot", {})
    for name, measures in {"": zero_shot}.items() if "top1" in zero_shot else zero_shot.items():
        yield (f"zero-shot accuracy {measures['top1']:.1%} on {measures['num_images']:,} images of "
               f"{measures['num_classes']} classes (chance {measures['chance']:.1%}){f', {name}' if name else ''}")
    if "bits_per_byte" in found:
        yield (f"loss {found['loss']:.4f}, perplexity {found['perplexity']:.2f}, "
               f"{found['bits_per_byte']:.4f} bits per byte")
    if "accuracy" in found:
        yield (f"{found['objective']}: loss {found['loss']:.4f}, {found['accuracy']:.1%} of {found['num_targets']:,} "
               "targets right")
    if "next_sentence_accuracy" in found:
        yield (f"next_sentence: loss {found['next_sentence_loss']:.4f}, {found['next_sentence_accuracy']:.1%} of the "
               "pairs right")


def _check(args: argparse.Namespace) -> None:
    for path in (args.checkpoint, *args.data):
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
    for name, least in (("samples", 1), ("batch", 1), ("examples", 0), ("sequence_length", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: at least {least}")


def _check_for(args: argparse.Namespace, trained: "Trained") -> None:
    """Raises UserError for options that the model's family does not have."""
    spec, family = trained.spec, trained.model.family
    if args.examples and spec.generation != "answer":
        raise UserError(f"--examples {args.examples}: for models that write an answer "
                        f"({families_with(generation='answer')}), and {args.checkpoint} holds a {family}")
    if args.sequence_length and spec.evaluation != "language":
        raise UserError(f"--sequence-length {args.sequence_length}: for decoders "
                        f"({families_with(evaluation='language')}), and {args.checkpoint} holds a {family}, whose "
                        "objective fills the length it was trained with")
    if args.sequence_length and args.sequence_length > trained.model.sequence_length:
        raise UserError(f"--sequence-length {args.sequence_length}: {args.checkpoint} was trained with at most "
                        f"{trained.model.sequence_length} tokens")


def _shown(batches: Iterable[dict]) -> Iterator[dict]:
    """The batches, with the number of samples so far on standard error every few seconds."""
    last, num_rows = time.monotonic(), 0
    for batch in batches:
        yield batch
        num_rows += len(batch["tokens"])
        if time.monotonic() - last > SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            sys.stderr.write(f"{num_rows:,} samples\n")


# -- images -----------------------------------------------------------------------------------------------------------


def _zero_shot(args: argparse.Namespace, trained: "Trained", groups: "Groups") -> dict:
    from data_pipeline.folder.manifest import MANIFEST_NAME
    from data_pipeline.image_text.pair_dataset import PairsDataset
    from pretrain.inference.zero_shot import DualEncoder, classification, retrieval, templates_of

    config = cast("ImageTextModel", trained.model)
    model = DualEncoder(trained.stage, trained.tokenizer, config.image_size, config.sequence_length,
                        batch=args.batch)
    found: dict = {}
    for path in args.data:
        if not path.is_dir():
            raise UserError(f"{path} is a file; give a directory with a folder per class, or a dataset folder of pairs")
        if (path / MANIFEST_NAME).exists():
            dataset = PairsDataset.open(path, config.image_size)
            found.setdefault("retrieval", {})[str(path)] = retrieval(model, dataset, args.samples)
        else:
            templates = templates_of(path, args.templates)
            found.setdefault("zero_shot", {})[str(path)] = classification(model, path, templates)
    return {kind: next(iter(by_path.values())) if len(by_path) == 1 else by_path for kind, by_path in found.items()}


# -- text -------------------------------------------------------------------------------------------------------------


def _language(args: argparse.Namespace, trained: "Trained", groups: "Groups") -> dict:
    from parallel.tensor_parallel import TensorParallel
    from pretrain.inference.language import language_measures, stream_batches, summed_loss
    from pretrain.objectives import OBJECTIVES, make_loss

    text = _first_documents(_dataset(args, trained), args.samples)
    plain = OBJECTIVES["causal_lm"].config_class()
    objective = make_loss(plain, trained.model, TensorParallel(groups, trained.device))
    length = args.sequence_length or trained.model.sequence_length
    batches = stream_batches(text, length, args.batch, trained.device)
    nats, num_tokens = summed_loss(trained.stage, objective, _shown(batches))
    return language_measures(nats, num_tokens, text.text_bytes)


def _masked_quality(args: argparse.Namespace, trained: "Trained", groups: "Groups") -> dict:
    from parallel.tensor_parallel import TensorParallel
    from pretrain.inference.masked_quality import corrupted_batches, examples, masked_measures
    from pretrain.objectives import make_loss

    dataset = _dataset(args, trained)
    objective = make_loss(trained.objective, trained.model, TensorParallel(groups, trained.device))
    batches = corrupted_batches(trained, dataset, args.batch, args.samples)
    found: dict[str, Any] = {**masked_measures(trained, objective, _shown(batches))}
    if args.examples:
        found["examples"] = examples(trained, corrupted_batches(trained, dataset, 1, args.examples), args.examples)
    return found


def _dataset(args: argparse.Namespace, trained: "Trained") -> "TokenDataset | TextDataset":
    """A dataset folder that was made with the model's tokenizer, or files as the tokenizer encodes them."""
    from data_pipeline.folder.manifest import MANIFEST_NAME
    from data_pipeline.text.corpus import CorpusOptions, documents
    from data_pipeline.tokens.in_memory_dataset import TextDataset
    from data_pipeline.tokens.token_dataset import TokenDataset

    folder = args.data[0]
    if len(args.data) == 1 and (folder / MANIFEST_NAME).exists():
        dataset = TokenDataset.open(folder)
        if dataset.manifest.tokenizer.sha256 != trained.tokenizer.sha256:
            raise UserError(f"{folder} was made with another tokenizer than the model's: give the text itself, or "
                            "write the dataset again with the tokenizer of the model")
        return dataset
    corpus = documents([str(path) for path in args.data], CorpusOptions(field=args.field))
    if next(iter(corpus), None) is None:
        raise UserError(corpus.nothing_left())
    return TextDataset((document.text for document in corpus), trained.tokenizer)


def _first_documents(dataset: "TokenDataset | TextDataset", count: int | None) -> "Text":
    """The first `count` documents (None: all) as one stream."""
    from pretrain.inference.language import Text

    count = min(count or len(dataset), len(dataset))
    tokens = [dataset.tokens(number).tolist() for number in range(count)]
    return Text(tokens, dataset.text_bytes(count), dataset.end_of_text)
