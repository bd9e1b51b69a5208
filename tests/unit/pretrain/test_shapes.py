"""The description of a model without torch: figures that follow from it, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import yaml

from pretrain.config.run_config import load_config
from pretrain.models import family_spec
from pretrain.models.family import heads_divide
from pretrain.models.shapes import activations
from tests.helpers.recipes import recipe_of

BERT_BASE = {"layers": 12, "hidden": 768, "heads": 12, "vocab_size": 30522, "sequence_length": 512}
BERT_BASE_BLOCK = 7_087_872  # 4 (h^2 + h) + 8 h^2 + 5 h + 4 h for h = 768


def config_of(family, tmp_path, objective=None, **model):
    content = recipe_of(family)
    content = {**content, "model": {**content["model"], **model}, "data": {"train": "none"},
               "objective": {**content["objective"], **(objective or {})}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return load_config(tmp_path / "recipe.yaml")


def test_shared_blocks_count_once_and_cost_as_many():
    spec = family_spec("bert")
    plain, shared = (spec.config_class(**BERT_BASE, shared_blocks=value) for value in (False, True))
    assert spec.parameter_count(plain) == 110_106_428
    assert spec.parameter_count(shared) == 110_106_428 - 11 * BERT_BASE_BLOCK
    assert spec.flops_per_unit(plain, 509) == spec.flops_per_unit(shared, 509)


def test_counting_takes_no_time_for_any_number_of_layers():
    """A config may ask for more layers than fit anywhere, and must be told so at once."""
    spec = family_spec("gpt")
    config = spec.config_class(layers=10**12, hidden=64, heads=4, vocab_size=64, sequence_length=8)
    assert spec.traits(config).layers == 10**12
    assert spec.parameter_count(config) > 10**12 and spec.flops_per_unit(config, 8) > 10**12


def test_masked_tokens_alone_reach_berts_head(tmp_path):
    few, many = (config_of("bert", tmp_path, {"mask_ratio": ratio}) for ratio in (0.15, 0.6))
    assert (few.num_predictions, many.num_predictions) == (4, 17)  # of 29 tokens of text
    heads = [config.spec.ends(config.model, config.num_predictions)["head"].multiply_adds for config in (few, many)]
    assert heads == [number * 64 * (544 + 64) for number in (4, 17)]
    flops = [config.spec.flops_per_unit(config.model, 1, config.num_predictions) for config in (few, many)]
    assert flops[1] - flops[0] == 6 * (heads[1] - heads[0])


def test_costs_are_multiply_adds_in_every_family(tmp_path):
    """A T5 whose target is short: its decoder costs less, and its head the products of the target's tokens."""
    config = config_of("t5", tmp_path)
    costs = {name: shape.cost for name, shape in config.spec.layer_shapes(config.model).items()}
    assert costs["decoder.blocks.0"] < costs["encoder.blocks.0"]
    assert costs["head"] == 12 * 64 * 544
    assert costs["encoder.blocks.0"] == 32 * (4 * 64 * 32 + 2 * 64 * 256) + 2 * 32 * 32 * 32
    assert costs["embedding"] == 2 * 32 * 64


def test_activations_are_known_of_dense_pre_norm_blocks_only(tmp_path):
    block = config_of("gpt", tmp_path).spec.blocks(config_of("gpt", tmp_path).model)[0]
    layout = {"vocab_size": 512, "micro_batch": 2, "element_bytes": 4}
    assert activations(block, **layout, context=2).tokens == 32
    for other in (replace(block, norm_position="post"), replace(block, num_memory_tokens=5)):
        with pytest.raises(ValueError, match="dense pre-norm"):
            activations(other, **layout)


@pytest.mark.parametrize(("family", "fields", "where", "change"), [
    ("gpt", {"heads": 5}, "model.heads", "set model.heads to one of 2, 4, 8, or model.hidden to 60 or 65"),
    ("t5", {"heads": 5, "head_width": None}, "model.heads", ", or give model.head_width"),
    ("t5", {"heads": 96, "head_width": None}, "model.heads", "set model.heads to one of 16, 32, 64"),
    ("bart", {"heads": 5}, "model.heads", "set model.heads to one of 2, 4, 8"),
    ("bert", {"heads": 5}, "model.heads", "set model.heads to one of 2, 4, 8"),
    ("clip", {"text_heads": 5}, "model.text_heads", "or model.text_hidden to 30 or 35"),
])  # fmt: skip
def test_heads_that_do_not_divide_are_refused_with_a_change(family, fields, where, change, tmp_path):
    config = config_of(family, tmp_path, **fields)
    (problem,) = config.spec.problems(config.model)
    assert problem[0] == where and change in problem[3]
    assert config.spec.traits(config.model)  # the other rules are checked all the same


def test_heads_that_divide_are_no_problem():
    assert list(heads_divide(64, 4)) == []
