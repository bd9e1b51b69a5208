"""Which checkpoints a config may continue."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.errors import ConfigError
from pretrain.config.run_config import load_config
from pretrain.training.resume import check_same_run, dataset_fingerprint

FOLDER = Path("checkpoints/step-00000010")


def manifest_of(config, **model) -> dict:
    written = json.loads(config.model_dump_json())
    return {"config": {**written, "model": {**written["model"], **model}},
            "dataset": dataset_fingerprint(config.data.train)}


def test_a_key_newer_than_the_checkpoint_had_its_default(recipe):
    config = load_config(recipe)
    manifest = manifest_of(config)
    for name in ("experts", "top_k", "balance_loss"):
        del manifest["config"]["model"][name]
    check_same_run(config, manifest, FOLDER)
    with pytest.raises(ConfigError) as refused:
        check_same_run(load_config(recipe, ["model.experts=4"]), manifest, FOLDER)
    (problem,) = refused.value.problems
    assert problem.where == "model.experts"
    assert "4, while the checkpoint step-00000010 was trained with 0" in problem.asked


def test_every_difference_in_what_is_learnt_is_told(recipe):
    config = load_config(recipe, ["model.experts=4"])
    with pytest.raises(ConfigError) as refused:
        check_same_run(config, manifest_of(config, top_k=2, hidden=128), FOLDER)
    assert [problem.where for problem in refused.value.problems] == ["model.hidden", "model.top_k"]


def test_other_frozen_parameters_are_another_run(recipe):
    with pytest.raises(ConfigError) as refused:
        check_same_run(load_config(recipe, ["model.freeze=[embedding.*]"]), manifest_of(load_config(recipe)), FOLDER)
    (problem,) = refused.value.problems
    assert problem.where == "model.freeze"
