"""The smallest useful config of each family, for tests."""

from __future__ import annotations

import random
from itertools import accumulate, product
from pathlib import Path

import yaml

from data_pipeline.text.corpus import documents
from data_pipeline.text.tokenizer import TokenizerOptions, sample_text, train_tokenizer
from data_pipeline.tokens.token_writer import write_dataset

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


def write_drawn_dataset(folder: Path) -> Path:
    """Writes `train` and `heldout` from drawn prose, with a vocabulary of 512; returns the folder.

    The text never changes: what layouts may differ by depends on it, and a test must not get another with a commit.
    """
    rng, texts = random.Random(7), {"train": 60, "heldout": 6}
    syllables = ["".join(parts) for parts in product("bdfgklmnprst", "aeiou", ("", "n", "r", "s"))]
    words = ["".join(rng.choices(syllables, k=rng.choice((1, 2, 2, 3)))) for _ in range(1500)]
    for split, num_documents in texts.items():
        (folder / "text" / split).mkdir(parents=True)
        for number in range(num_documents):
            (folder / "text" / split / f"{number:02}.txt").write_text(_prose(rng, words), encoding="utf-8")
    corpus = documents([folder / "text" / "train"])
    options = TokenizerOptions(vocab_size=VOCAB_SIZE, sample_bytes=300_000)
    tokenizer = train_tokenizer(sample_text(corpus, options.sample_bytes, options), options)
    (folder / "tokenizer.model").write_bytes(tokenizer.model)
    write_dataset(corpus, tokenizer, folder / "train", split="train")
    write_dataset(documents([folder / "text" / "heldout"]), tokenizer, folder / "heldout", split="heldout")
    return folder


def _prose(rng: random.Random, words: list[str]) -> str:
    """About 8 kB of sentences whose words follow Zipf's law, with some numbers among them."""
    weights = list(accumulate(1 / rank for rank in range(1, len(words) + 1)))
    sentences = []
    for _ in range(130):
        drawn = rng.choices(words, cum_weights=weights, k=rng.randint(4, 14))
        if rng.random() < 0.3:
            drawn.insert(rng.randint(1, len(drawn)), str(rng.randint(0, 2000)))
        sentences.append(" ".join(drawn).capitalize() + rng.choice(".,.?\n"))
    return " ".join(sentences)


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
