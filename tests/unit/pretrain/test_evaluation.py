"""Evaluation: each token once, bits per byte by hand, templates, recall among equal captions; the verb on real runs."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch

from common.errors import UserError
from data_pipeline.text.corpus import Document
from data_pipeline.text.tokenizer import TokenizerOptions, train_tokenizer
from data_pipeline.tokens.token_writer import write_dataset
from pretrain.cli import main
from pretrain.inference.language import Text, language_measures, stream_batches
from pretrain.inference.zero_shot import DEFAULT_TEMPLATES, _recalls, class_folders, filled, templates_of
from pretrain.training.metrics import EVALUATIONS_FILE, METRICS_FILE, read_metrics
from tests.helpers.ranks import run_ranks, train_on
from tests.helpers.recipes import CLIP, recipe_of, write_recipe


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
        with pytest.raises(UserError, match=r"templates\.json"):
            templates_of(tmp_path)
    with pytest.raises(UserError, match="at least"):
        class_folders(tmp_path)


def test_recall_counts_equal_captions_as_hits():
    keys = torch.eye(4)
    queries = torch.eye(4)[[1, 0, 2, 3]]  # the first two look like each other's partner
    assert _recalls(queries, keys, torch.tensor([0, 1, 2, 3])) == {"recall@1": 0.5, "recall@5": 1.0, "recall@10": 1.0}
    assert _recalls(queries, keys, torch.tensor([0, 0, 2, 3]))["recall@1"] == 1.0


def evaluated(info, argv: list[str]) -> tuple[int, str]:
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


@pytest.mark.slow
@pytest.mark.parametrize("family", ["t5", "bart", "bert"])
def test_noised_text_on_a_dataset_and_on_the_text_of_it(family, dataset, tmp_path):
    """The held-out loss of training, from shards and from the files they were made of, in batches of any size."""
    recipe = write_recipe(tmp_path / "recipe.yaml", dataset, recipe_of(family))
    assert train_on(1, recipe, [f"run.dir={tmp_path / 'run'}", "run.steps=2", "log.evaluate_every=2",
                                "log.evaluate_samples=7"]) == [0]
    record = read_metrics(tmp_path / "run" / EVALUATIONS_FILE)[-1]
    expected = record["heldout_loss"]
    argv = [str(tmp_path / "run"), "--samples", "7"]
    if family != "bert":
        argv += ["--examples", "2"]
    found = []
    for data, batch in ((dataset / "heldout", "3"), (dataset / "text" / "heldout", "32")):
        code, written = run_ranks(evaluated, 1, [*argv, "--data", str(data), "--batch", batch])[0]
        assert code == 0
        found.append(json.loads(written))
    first, second = found
    assert first["loss"] + first.get("next_sentence_loss", 0.0) == pytest.approx(expected, rel=1e-5)
    assert first["loss"] == pytest.approx(second["loss"], rel=1e-5)
    assert (first["num_targets"], first["accuracy"]) == (second["num_targets"], second["accuracy"])
    assert 0 <= first["accuracy"] <= 1
    if family == "bert":
        assert (record["heldout_loss/masked_lm"], record["heldout_loss/next_sentence"]) \
            == pytest.approx((first["loss"], first["next_sentence_loss"]), rel=1e-5)
        steps = read_metrics(tmp_path / "run" / METRICS_FILE)
        assert all(step["loss"] == pytest.approx(step["loss/masked_lm"] + step["loss/next_sentence"]) for step in steps)
        assert "next_sentence" in (tmp_path / "run" / "logs" / "train.log").read_text(encoding="utf-8")
        assert 0 <= first["next_sentence_accuracy"] <= 1
        return
    assert first["examples"] == second["examples"]
    for example in first["examples"]:
        assert ("<extra_id_0>" if family == "t5" else "<mask>") in example["source"]
        assert example["truth"].startswith("<extra_id_0>" if family == "t5" else "<s>")


def test_an_answer_stops_at_the_end_and_is_the_most_likely(dataset, tmp_path):
    recipe = write_recipe(tmp_path / "recipe.yaml", dataset, recipe_of("t5"))
    assert run_ranks(answered, 1, str(recipe))[0]


def answered(info, recipe: str) -> bool:
    """An answer taken token by token is what the whole sequence makes most likely; it stops at the stop token."""
    from parallel.parameter_plan import draw
    from parallel.single_rank import single_rank
    from pretrain.config.run_config import load_config
    from pretrain.inference.generation import answer_tokens
    from tests.contracts.test_families import stage_of

    config = load_config(recipe)
    with single_rank() as groups:
        stage = stage_of(config, groups)
        with torch.no_grad():
            for name, parameter in stage.named_global_parameters():
                parameter.copy_(draw(name, tuple(parameter.shape), parameter.plan, 3))
        source = torch.randint(config.model.vocab_size, (1, 32), generator=torch.Generator().manual_seed(1))
        answer = answer_tokens(stage, (source,), 5, 8, stop_token=-1)
        logits = stage.run((source, torch.tensor([[5, *answer[:-1]]])))
        assert logits.argmax(dim=-1)[:, 0].tolist() == answer
        assert len(answer) == 8
        place = next(index for index, token in enumerate(answer) if token == answer[4])
        return answer_tokens(stage, (source,), 5, 8, stop_token=answer[4]) == answer[:place]


@pytest.mark.slow
def test_data_that_does_not_fit_the_model(recipe, dataset, shapes, tmp_path):
    """Each mistake is told in words, with its exit code and without a traceback, and nothing is printed for a program.

    Another family's data, another tokenizer's, no text, a damaged or missing tp, examples of a decoder.
    """
    assert train_on(1, recipe, [f"run.dir={tmp_path / 'run'}", "run.steps=1", "checkpoint.every=1"]) == [0]
    other = train_tokenizer(["another text altogether, of other words\n" * 40], TokenizerOptions(vocab_size=300))
    write_dataset([Document("a", "some text\n" * 99)], other, tmp_path / "other")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "folder").mkdir()
    cut = Path(shutil.copytree(dataset / "heldout", tmp_path / "cut"))
    tp = next(cut.glob("*.tar"))
    tp.write_bytes(tp.read_bytes()[:-1024])
    run = tmp_path / "run"
    mistakes = [([run, "--data", shapes / "heldout"], 2, "images with captions, where tokenized documents are needed"),
                ([run, "--data", tmp_path / "other"], 2, "another tokenizer than the model's"),
                ([run, "--data", tmp_path / "empty.txt"], 2, "no document is left"),
                ([run, "--data", tmp_path / "folder"], 2, r"holds no .* \.txt file"),
                ([run, "--data", cut], 65, "where the manifest says"),
                ([run, "--data", dataset / "heldout", "--examples", "1"], 2, "write an answer"),
                ([tmp_path / "folder", "--data", dataset / "heldout"], 2, "no checkpoint here")]
    for argv, expected, words in mistakes:
        code, written, told = run_ranks(complained, 1, [str(part) for part in argv])[0]
        assert (code, written) == (expected, ""), argv
        assert re.search(words, told), told
        assert "Traceback" not in told
    weights = next((run / "checkpoints").glob("*/*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    code, written, told = run_ranks(complained, 1, [str(run), "--data", str(dataset / "heldout")])[0]
    assert (code, written) == (65, "")
    assert weights.name in told


def complained(info, argv: list[str]) -> tuple[int, str, str]:
    told = io.StringIO()
    with contextlib.redirect_stderr(told):
        code, written = evaluated(info, argv)
    return code, written, told.getvalue()


@pytest.mark.parametrize("argv", [["nowhere", "--data", "."], [".", "--data", "nowhere"],
                                  [".", "--data", ".", "--batch", "0"], [".", "--data", "."]])  # fmt: skip
def test_mistakes(argv, capsys):
    assert main(["evaluate", *argv]) == 2
    assert "Traceback" not in capsys.readouterr().err
