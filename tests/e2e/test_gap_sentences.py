"""Masking the principal sentences teaches a model to write summaries better than masking random ones.

Zhang et al. 2020, section 6.1.1, compare the two by what comes of fine-tuning; here each drawn text has one sentence
that collects the key words of the others, and both models are measured on that sentence, given the rest.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from data_pipeline.text.corpus import documents
from data_pipeline.text.tokenizer import TokenizerOptions, sample_text, train_tokenizer
from data_pipeline.tokens.token_writer import write_dataset
from pretrain.training.metrics import EVALUATIONS_FILE, read_metrics
from tests.helpers.ranks import train_on
from tests.helpers.recipes import recipe_of, write_recipe

pytestmark = pytest.mark.slow

STEPS = 150
KEYS, FILLERS = [f"key{letter}" for letter in "abcdefghijkl"], [f"w{number}" for number in range(60)]


def text(draw: random.Random) -> str:
    """Five sentences, each with a key word among fillers, and one at a random place with all five key words."""
    keys = draw.sample(KEYS, 5)
    sentences = [draw.choices(FILLERS, k=3) + [key] + draw.choices(FILLERS, k=2) for key in keys]
    sentences.insert(draw.randint(0, 5), keys)
    return " ".join(" ".join(words) + "." for words in sentences)


@pytest.fixture(scope="module")
def summaries(tmp_path_factory) -> Path:
    folder, draw = tmp_path_factory.mktemp("summaries"), random.Random(5)
    for split, count in (("train", 3000), ("heldout", 64)):
        (folder / "text" / split).mkdir(parents=True)
        lines = [json.dumps({"text": text(draw)}) for _ in range(count)]
        (folder / "text" / split / "texts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    options = TokenizerOptions(vocab_size=400)
    tokenizer = train_tokenizer(sample_text(documents([folder / "text" / "train"]), 10**6, options), options)
    for split in ("train", "heldout"):
        write_dataset(documents([folder / "text" / split]), tokenizer, folder / split, split=split)
    return folder


def loss_on_summaries(folder: Path, recipe: Path, choice: str) -> float:
    """Held-out loss on the principal sentences, of a model that was trained on those of `choice`."""
    common = ["objective.name=gap_sentences", "objective.gap_ratio=0.1", "optimizer.lr=6e-3"]
    trained = [*common, f"objective.choice={choice}", f"run.dir={folder / choice}", f"run.steps={STEPS}",
               "schedule.warmup_steps=10", f"checkpoint.every={STEPS}"]
    assert train_on(1, recipe, trained) == [0]
    measured = [*common, f"checkpoint.start_from={folder / choice}", f"run.dir={folder / f'{choice}-measured'}",
                "run.steps=1", "checkpoint.every=0", "log.evaluate_every=1", "log.evaluate_samples=64"]
    assert train_on(1, recipe, measured) == [0]
    return read_metrics(folder / f"{choice}-measured" / EVALUATIONS_FILE)[0]["heldout_loss"]


def test_principal_sentences_beat_random_ones(summaries, tmp_path):
    recipe = write_recipe(tmp_path / "t5.yaml", summaries, recipe_of("t5"))
    principal, drawn = (loss_on_summaries(tmp_path, recipe, choice) for choice in ("principal", "random"))
    assert principal < drawn - 0.1, f"principal {principal:.3f}, random {drawn:.3f}"
