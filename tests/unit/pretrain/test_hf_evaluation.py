"""Evaluation of transformers folders: the numbers of the run they came from, and those of transformers itself."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import pytest
import torch

from pretrain.cli import main
from pretrain.models import FAMILIES
from tests.helpers.marks import slow_after
from tests.helpers.ranks import run_ranks, train_on
from tests.helpers.recipes import CLIP, recipe_of, write_recipe

transformers = pytest.importorskip("transformers")

REPOSITORY = Path(__file__).parents[3]
TEXT = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def told(argv: list[str]) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a verb."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(argv)
    return code, out.getvalue(), err.getvalue()


def measured(info, *commands: list[str]) -> list[dict]:
    found = []
    for argv in commands:
        code, out, err = told(argv)
        assert code == 0, err
        found.append(json.loads(out) if argv[0] == "evaluate" else {})
    return found


@pytest.mark.parametrize("family", slow_after(1, list(FAMILIES)))
def test_a_run_and_the_folder_exported_from_it(family, dataset, shapes, tmp_path):
    run, exported = str(tmp_path / "run"), str(tmp_path / "exported")
    if family == "clip":
        # without the bias of SigLIP, which transformers' class does not have
        content = {**CLIP, "model": {name: value for name, value in CLIP["model"].items() if name != "logit_bias"}}
        recipe, data, more = write_recipe(tmp_path / "recipe.yaml", shapes, content), shapes / "zero-shot", []
    else:
        recipe, data, more = write_recipe(tmp_path / "recipe.yaml", dataset, recipe_of(family)), dataset / "heldout", \
            ["--samples", "5"]
    assert train_on(1, recipe, [f"run.dir={run}", "run.steps=2"]) == [0]
    data_of = [str(data)] if family == "clip" else [str(data), str(REPOSITORY / "benchmarks" / "README.md")]
    commands = [["evaluate", model, "--data", path, *more] for path in data_of for model in (run, exported)]
    export = ["checkpoint", "export", run, "--to", exported, "--no-certificate"]
    _, *found = run_ranks(measured, 1, export, *commands)[0]
    for ours, theirs in zip(found[::2], found[1::2], strict=True):
        for one in (ours, theirs):
            del one["checkpoint"], one["step"]
        assert list(flat(ours)) == [(name, pytest.approx(value, rel=1e-5) if isinstance(value, float) else value)
                                    for name, value in flat(theirs)]


def flat(values: dict, prefix: str = ""):
    """Every number and text of nested objects, by path."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        elif not isinstance(value, list):
            yield prefix + name, value


# -- models that were never here --------------------------------------------------------------------------------------


def byte_level(folder: Path, *names: str, **roles: str):
    """A byte-level BPE of few merges with special tokens, trained on this project's page."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300 + len(names), special_tokens=list(names),
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([TEXT], trainer)
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)
    made.save_pretrained(folder)
    return made


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A folder of a random GPT-2 with its own tokenizer."""
    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = byte_level(folder, "<|end|>", bos_token="<|end|>", eos_token="<|end|>")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=len(tokenizer), n_positions=24, n_embd=32, n_layer=2, n_head=2)
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(folder)
    return folder, tokenizer, model


def test_the_loss_is_that_of_transformers(gpt2, tmp_path):
    folder, tokenizer, model = gpt2
    text = TEXT[:1500] + " 漢字 <|end|>\n"
    (tmp_path / "page.txt").write_text(text, encoding="utf-8")
    [found] = run_ranks(measured, 1, ["evaluate", str(folder), "--data", str(tmp_path / "page.txt"), "--batch", "3"])[0]
    end = tokenizer.eos_token_id
    ids = [end, *tokenizer.encode(text, split_special_tokens=True), end]
    assert end not in ids[1:-1]
    nats = 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, 24):
            window = torch.tensor([ids[start : start + 25]])
            logits = model(window[:, :-1]).logits
            nats += float(torch.nn.functional.cross_entropy(logits[0], window[0, 1:], reduction="sum"))
    assert found["num_tokens"] == len(ids) - 1
    assert found["loss"] == pytest.approx(nats / found["num_tokens"], rel=1e-5)
    assert found["text_bytes"] == len(text.encode())
    assert (found["step"], found["family"]) == (None, "gpt")


def test_generate_continues_as_transformers_does(gpt2, capsys):
    folder, tokenizer, model = gpt2
    prompt = "The layout"
    expected = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=8, do_sample=False,
                              pad_token_id=tokenizer.eos_token_id)[0]
    assert main(["generate", str(folder), "--prompt", prompt, "--max-tokens", "8", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.rstrip("\n") == tokenizer.decode(expected, skip_special_tokens=True).rstrip("\n")


def test_hidden_tokens_by_the_ids_of_the_folder(tmp_path):
    """A BERT whose special tokens are its first ids: they frame what it sees, and stand for what is hidden."""
    from parallel.single_rank import single_rank
    from pretrain.inference.trained_model import open_model

    folder = tmp_path / "bert"
    tokenizer = byte_level(folder, "[PAD]", "[CLS]", "[SEP]", "[MASK]", pad_token="[PAD]", cls_token="[CLS]",
                           sep_token="[SEP]", mask_token="[MASK]")
    config = transformers.BertConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1,
                                     num_attention_heads=2, intermediate_size=64, max_position_embeddings=32)
    transformers.BertForMaskedLM(config).save_pretrained(folder)
    (tmp_path / "page.txt").write_text(TEXT, encoding="utf-8")
    [found] = run_ranks(measured, 1, ["evaluate", str(folder), "--data", str(tmp_path / "page.txt")])[0]
    assert found["objective"] == "masked_lm"
    assert found["loss"] == pytest.approx(torch.tensor(float(len(tokenizer))).log().item(), abs=1.0)
    with single_rank() as groups:
        special = open_model(folder, groups).special
    assert (special.start, special.separator, special.mask, special.pad) == (1, 2, 3, 0)


def wrong_tokenizer(folder: Path) -> None:
    byte_level(folder, "<|end|>", bos_token="<|end|>", eos_token="<|end|>")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 280}))


def no_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-200])


def another_model(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "opt"}))


@pytest.mark.parametrize(("spoil", "expected", "words"), [
    (wrong_tokenizer, 2, "301 token ids"), (no_tokenizer, 2, "tokenizer files"), (cut_short, 65, "model.safetensors"),
    (another_model, 2, "model_type"),
])  # fmt: skip
def test_what_is_wrong_with_a_folder_is_said(spoil, expected, words, gpt2, tmp_path):
    import shutil

    folder = Path(shutil.copytree(gpt2[0], tmp_path / "folder"))
    spoil(folder)
    (tmp_path / "page.txt").write_text(TEXT, encoding="utf-8")
    code, out, err = told(["evaluate", str(folder), "--data", str(tmp_path / "page.txt")])
    assert (code, out) == (expected, "")
    assert words in err
    assert "Traceback" not in err


def test_shards_of_another_tokenizer(gpt2, dataset):
    code, out, err = told(["evaluate", str(gpt2[0]), "--data", str(dataset / "heldout")])
    assert (code, out) == (2, "")
    assert "give the text itself" in err
