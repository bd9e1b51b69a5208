"""Evaluation: each token once, bits per byte by hand, templates, recall among equal captions; the verb on real runs."""

from __future__ import annotations

import json
import math

import pytest
import torch

from data_pipeline.errors import DataError
from pretrain.cli import main
from pretrain.evaluation.language import Text, language_measures, stream_batches
from pretrain.evaluation.zero_shot import DEFAULT_TEMPLATES, _recalls, class_folders, filled, templates_of
from tests.helpers.ranks import run_ranks, train_on
from tests.helpers.recipes import CLIP, write_recipe


@pytest.mark.parametrize("length", [1, 3, 7, 20])
def test_every_token_is_a_target_once(length):
    documents = [[5, 6, 0], [7, 0], [8, 9, 10, 11, 0]]
    seen = []
    for batch in stream_batches(Text(documents, 10, 0), length, 2, torch.device("cpu")):
        assert batch["tokens"].shape[1] == length + 1
        counts = batch["weights"].bool()
        seen += batch["tokens"][:, 1:][counts].tolist()
    assert seen == [token for document in documents for token in document]


def test_measures_by_hand():
    found = language_measures(nats=20.0, num_tokens=10, text_bytes=40)
    assert found["loss"] == 2.0
    assert found["perplexity"] == pytest.approx(math.exp(2))
    assert found["bits_per_byte"] == pytest.approx(20 / math.log(2) / 40)
    assert language_measures(1e6, 10, 40)["perplexity"] == math.inf


def test_templates(tmp_path):
    assert filled("a photo of a {}", "orange ring") == "a photo of an orange ring"
    assert filled("a {} in the middle", "red ring") == "a red ring in the middle"
    assert templates_of(tmp_path) == list(DEFAULT_TEMPLATES)
    for content in ("{", "[]", '["no place"]', '{"a": 1}'):
        (tmp_path / "templates.json").write_text(content)
        with pytest.raises(DataError, match=r"templates\.json"):
            templates_of(tmp_path)
    with pytest.raises(DataError, match="at least"):
        class_folders(tmp_path)


def test_recall_counts_equal_captions_as_hits():
    keys = torch.eye(4)
    queries = torch.eye(4)[[1, 0, 2, 3]]  # the first two look like each other's partner
    assert _recalls(queries, keys, torch.tensor([0, 1, 2, 3])) == {"recall@1": 0.5, "recall@5": 1.0, "recall@10": 1.0}
    assert _recalls(queries, keys, torch.tensor([0, 0, 2, 3]))["recall@1"] == 1.0


def evaluated(info, argv: list[str]) -> tuple[int, str]:
    import contextlib
    import io

    written = io.StringIO()
    with contextlib.redirect_stdout(written):
        code = main(["evaluate", *argv])
    return code, written.getvalue()


def test_a_dual_encoder(shapes, tmp_path):
    config = write_recipe(tmp_path / "clip.yaml", shapes, CLIP)
    assert train_on(1, config, [f"run.dir={tmp_path / 'run'}", "run.steps=2"]) == [0]
    broken = shapes / "zero-shot" / "red circle" / "broken.jpg"
    broken.write_bytes(b"not an image")
    argv = [str(tmp_path / "run"), "--data", str(shapes / "zero-shot"), str(shapes / "heldout")]
    code, text = run_ranks(evaluated, 1, argv)[0]
    broken.unlink()
    found = json.loads(text)
    assert code == 0
    assert found["step"] == 2
    zero_shot, retrieval = found["zero_shot"], found["retrieval"]
    assert (zero_shot["num_images"], zero_shot["num_skipped"], zero_shot["num_classes"]) == (32, 1, 16)
    assert "broken.jpg" in zero_shot["skipped"][0]
    assert 0 <= zero_shot["top1"] <= zero_shot["top5"] <= 1
    assert retrieval["num_pairs"] == 32
    assert retrieval["image_to_text"]["recall@1"] <= retrieval["image_to_text"]["recall@10"]


def test_a_language_model_on_a_dataset_and_on_the_text_of_it(recipe, dataset, tmp_path):
    assert train_on(1, recipe, [f"run.dir={tmp_path / 'run'}", "run.steps=2"]) == [0]
    text = tmp_path / "note.txt"
    text.write_text("def f(x):\n    return x\n\n" * 20)
    for data in (dataset / "heldout", text):
        code, written = run_ranks(evaluated, 1, [str(tmp_path / "run"), "--data", str(data), "--samples", "3"])[0]
        found = json.loads(written)
        assert code == 0
        assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
        bits = found["loss"] * found["num_tokens"] / math.log(2)
        assert found["bits_per_byte"] == pytest.approx(bits / found["text_bytes"])
    assert found["text_bytes"] == len(text.read_bytes().strip()) or found["text_bytes"] == len(text.read_bytes())


@pytest.mark.parametrize("argv", [["nowhere", "--data", "."], [".", "--data", "nowhere"],
                                  [".", "--data", ".", "--batch", "0"], [".", "--data", "."]])  # fmt: skip
def test_mistakes(argv, capsys):
    assert main(["evaluate", *argv]) == 2
    assert "Traceback" not in capsys.readouterr().err
