"""Patterns of `model.freeze` against the names of a model, and what is said of those that do not fit."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

from common.errors import ConfigError
from parallel.single_rank import single_rank
from pretrain.config.run_config import config_from, load_config
from pretrain.models import FAMILIES
from pretrain.models.build import build_stage
from pretrain.training.frozen_parameters import check_freeze, frozen_layers
from pretrain.training.optim import parameter_groups
from tests.helpers.recipes import recipe_of

EXPERTS = {"experts": 4, "top_k": 2}


@pytest.fixture(scope="module", autouse=True)
def groups():
    with single_rank() as found:
        yield found


def model_of(family: str, **changes):
    recipe = recipe_of(family)
    return config_from({**recipe, "model": {**recipe["model"], **changes}, "data": {"train": "none"}}, "test").model


@pytest.mark.parametrize(("family", "changes", "pattern", "words"), [
    ("gpt", {}, "embeding.*", ["'embeding.*', which matches no parameter", "did you mean 'embedding.*'?"]),
    ("gpt", {}, "blocks.0.atention.*", ["did you mean 'blocks.0.attention.*'?"]),
    ("gpt", {}, "blocks.7.*", ["matches no parameter", "did you mean 'blocks."]),
    ("gpt", {}, "zzz", ["matches no parameter", "correct the pattern"]),
    ("gpt", {}, "*", ["all parameters", "take a pattern out"]),
    ("gpt", EXPERTS, "blocks.1.feed_forward.experts.2.up.*",
     ["1 of 4 experts of blocks.1.feed_forward.experts.*.up.weight", "all experts of a layer or none"]),
    ("clip", {}, "vision.*", ["matches no parameter"]),
])  # fmt: skip
def test_patterns_that_do_not_fit(family, changes, pattern, words):
    with pytest.raises(ConfigError) as refused:
        check_freeze(model_of(family, freeze=[pattern], **changes))
    assert all(problem.where == "model.freeze" for problem in refused.value.problems)
    assert all(word in str(refused.value) for word in words), str(refused.value)


def test_all_problems_at_once():
    with pytest.raises(ConfigError) as refused:
        check_freeze(model_of("gpt", freeze=["embeding.*", "head.x"]))
    assert len(refused.value.problems) == 2


@pytest.mark.parametrize(("text", "words"), [("embedding.*", "a list in brackets"), ("[1]", "a text in quotes")])
def test_values_that_are_no_list_of_patterns(text, words, recipe):
    with pytest.raises(ConfigError, match="model.freeze") as refused:
        load_config(recipe, [f"model.freeze={text}"])
    assert words in str(refused.value)


@pytest.mark.parametrize("family", ["gpt", "t5", "bart", "bert", "clip"])
def test_what_matches_is_frozen_and_in_no_group(family, groups, monkeypatch):
    experts = EXPERTS if family in ("gpt", "t5", "bart") else {}
    model = model_of(family, freeze=["*.0.attention.*", "*norm*"], **experts)
    check_freeze(model)
    modules = import_module(f"{FAMILIES[family]}.modules")
    whole = modules.layers
    monkeypatch.setattr(modules, "layers", lambda config, tp: frozen_layers(whole(config, tp), config.freeze))
    stage = build_stage(model, groups, torch.device("cpu"))
    frozen = {name for name, parameter in stage.named_global_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, parameter in stage.named_global_parameters() if not parameter.plan.trainable}
    assert frozen == {name for name, _ in stage.named_global_parameters() if ".0.attention." in name or "norm" in name}
    kept = {id(parameter) for group in parameter_groups(stage.named_global_parameters(), 0.1)
            for parameter in group["params"]}
    assert kept == {id(parameter) for parameter in stage.parameters() if parameter.requires_grad}
