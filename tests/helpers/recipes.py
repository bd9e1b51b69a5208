"""The smallest useful config of each family, for tests."""

from __future__ import annotations

from pathlib import Path

import yaml

from data_pipeline.corpus import documents
from data_pipeline.shards import write_dataset
from data_pipeline.tokenizer import TokenizerOptions, sample_text, train_tokenizer

REPOSITORY = Path(__file__).parents[2]
VOCAB_SIZE = 512

GPT = {
    "run": {"dir": "unused", "steps": 24, "seed": 11},
    "model": {"family": "gpt", "layers": 4, "hidden": 64, "heads": 4, "vocab_size": VOCAB_SIZE, "sequence_length": 32},
    "objective": {"name": "causal_lm"},
    "parallel": {"micro_batch": 2, "global_batch": 8},
    # At 3e-3 a spike of the loss can leave a batch whose gradient norm layouts agree on to 1e-4 only.
    "optimizer": {"lr": 2e-3, "clip_norm": 1.0},
    "schedule": {"name": "cosine", "warmup_steps": 6},
    "checkpoint": {"every": 1000},
    "log": {"every": 100, "tensorboard": False},
}

CLIP = {
    "run": {"dir": "unused", "steps": 24, "seed": 11},
    "model": {"family": "clip", "image_size": 16, "patch_size": 4, "image_layers": 2, "image_hidden": 64,
              "image_heads": 4, "text_layers": 2, "text_hidden": 32, "text_heads": 4, "vocab_size": VOCAB_SIZE,
              "sequence_length": 15, "embedding": 32, "logit_bias": -10.0},
    "objective": {"name": "contrastive"},
    "parallel": {"micro_batch": 4, "global_batch": 16},
    "optimizer": {"lr": 1e-3, "clip_norm": 1.0},
    "schedule": {"name": "cosine", "warmup_steps": 6},
    "log": {"every": 100, "tensorboard": False},
}


def write_dataset_of_this_project(folder: Path) -> Path:
    """Writes `train` and `heldout` from this project's own source, with a vocabulary of 512; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    corpus = documents([REPOSITORY / room for room in ("parallel", "pretrain", "data_pipeline", "launchers")])
    options = TokenizerOptions(vocab_size=VOCAB_SIZE, sample_bytes=300_000)
    tokenizer = train_tokenizer(sample_text(corpus, options.sample_bytes, options), options)
    (folder / "tokenizer.model").write_bytes(tokenizer.model)
    write_dataset(corpus, tokenizer, folder / "train", split="train")
    write_dataset(documents([REPOSITORY / "benchmarks"]), tokenizer, folder / "heldout", split="heldout")
    return folder


def write_recipe(path: Path, dataset: Path, content: dict = GPT) -> Path:
    """Write a recipe that trains on `dataset`/train; returns its path."""
    data = {"train": str(dataset / "train"), "heldout": str(dataset / "heldout")}
    path.write_text(yaml.safe_dump({**content, "data": data}), encoding="utf-8")
    return path

TEXT_VOCAB_SIZE = VOCAB_SIZE + 32  # room for what objectives need beside the tokenizer's ids

# The usual objective of each family, at the smallest shape that divides by 4 (layers by 2 on either side).
MODELS = {
    "gpt": GPT["model"],
    "t5": {"family": "t5", "layers": 2, "hidden": 64, "heads": 4, "head_width": 8, "vocab_size": TEXT_VOCAB_SIZE,
           "sequence_length": 32, "target_length": 12},
    "bart": {"family": "bart", "layers": 2, "hidden": 64, "heads": 4, "vocab_size": TEXT_VOCAB_SIZE,
             "sequence_length": 32},
    "bert": {"family": "bert", "layers": 4, "hidden": 64, "heads": 4, "vocab_size": TEXT_VOCAB_SIZE,
             "sequence_length": 32},
    "clip": CLIP["model"],
}


def recipe_of(family: str) -> dict:
    """The smallest useful config of a family, with its usual objective."""
    from pretrain.models import family_spec

    return {**GPT, "model": MODELS[family], "objective": {"name": family_spec(family).objectives[0]}}
