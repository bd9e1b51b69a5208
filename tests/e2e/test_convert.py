"""A trained checkpoint goes out to transformers and comes in again, and training continues alike on other layouts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from pretrain.cli import main
from pretrain.training.metrics import read_metrics
from tests.helpers.ranks import train_on
from tests.helpers.recipes import GPT, write_recipe

pytestmark = pytest.mark.slow

MODEL = {**GPT["model"], "vocab_size": 515, "pad_vocab_to": 8, "kv_heads": 2, "positions": "rotary", "norm": "rmsnorm",
         "activation": "swiglu", "bias": False, "tied_head": False}


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory) -> Path:
    """A run of 4 steps on tensor 2 x pipeline 2 with sequence parallelism."""
    folder = tmp_path_factory.mktemp("convert")
    recipe = write_recipe(folder / "llama.yaml", dataset, {**GPT, "model": MODEL, "optimizer": {"lr": 1e-3}})
    codes = train_on(4, recipe, [f"run.dir={folder / 'run'}", "run.steps=4", "schedule.warmup_steps=1",
                                 "parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true"])
    assert codes == [0] * 4
    return folder


def test_out_and_in_and_on(trained, dataset, capsys):
    out, back = trained / "hf", trained / "back"
    assert main(["checkpoint", "export", str(trained / "run"), "--to", str(out)]) == 0, capsys.readouterr().err
    told = json.loads((out / "certificate.json").read_text())
    assert told["layout"] == {"tensor": 2, "sequence": True} and told["checkpoint"]["step"] == 4
    assert told["largest_differences"]["logits"] <= 1e-5 * max(1.0, told["largest_logit"])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    ids = tokenizer("def f(x):\n\treturn x", return_tensors="pt").input_ids
    assert theirs.config.vocab_size == 515 and theirs.config.eos_token_id == tokenizer.eos_token_id
    with torch.no_grad():
        assert theirs(ids).logits.shape == (1, ids.shape[1], 515)

    assert main(["checkpoint", "import", str(out), "--to", str(back)]) == 0
    recipe = back / "config.yaml"
    losses = {}
    for name, ranks, layout in (("tp2", 2, ["parallel.tensor=2", "model.pad_vocab_to=4"]), ("dp2", 2, [])):
        codes = train_on(ranks, recipe, [f"run.dir={trained / name}", "run.steps=3", "run.seed=11",
                                         f"data.train={dataset / 'train'}", "log.tensorboard=false", *layout])
        assert codes == [0] * ranks
        losses[name] = [record["loss"] for record in read_metrics(trained / name / "metrics.jsonl")]
    assert losses["tp2"] == pytest.approx(losses["dp2"], rel=1e-5)
    before = read_metrics(trained / "run" / "metrics.jsonl")
    assert losses["dp2"][0] < before[0]["loss"] - 0.05, "it did not start from what was learnt"

    assert train_on(1, recipe, [f"run.dir={back}", f"data.train={dataset / 'train'}"]) == [2]
    assert main(["generate", str(back), "--prompt", "def ", "--max-tokens", "4", "--temperature", "0"]) == 0
