"""What every family and every objective owes to the rest of the project."""

import ast
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml

from data_pipeline.corruption.special_ids import SpecialIds
from parallel.pipeline_stages import Stage, cut
from parallel.rules import table as rules
from parallel.single_rank import single_rank
from parallel.tensor_parallel import TensorParallel
from pretrain.config.run_config import load_config
from pretrain.models import FAMILIES, architectures, family_spec, hf_adapter
from pretrain.models.hf_map import TOKEN_IDS
from pretrain.objectives import OBJECTIVES, make_loss
from pretrain.objectives.objective import END_OF_TEXT_ROLE
from tests.helpers.recipes import recipe_of

ROOT = Path(__file__).parents[2]
CASES = [(family, name) for family in FAMILIES for name in family_spec(family).objectives]


@pytest.fixture(scope="module")
def alone():
    with single_rank() as groups:
        yield groups


def config_of(family, tmp_path, **model):
    content = recipe_of(family)
    content = {**content, "model": {**content["model"], **model}, "data": {"train": "none"}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return load_config(tmp_path / "recipe.yaml")


def stage_of(config, groups, device="cpu") -> Stage:
    modules = import_module(f"{FAMILIES[config.model.family]}.modules")
    with torch.device(device):
        specs = modules.layers(config.model, TensorParallel(groups, torch.device(device)))
        return Stage(specs, (0, len(specs)))


@pytest.mark.parametrize("padding", [1, 100])
@pytest.mark.parametrize("family", FAMILIES)
def test_built_parameters_are_those_counted(family, padding, alone, tmp_path):
    config = config_of(family, tmp_path, pad_vocab_to=padding)
    built = sum(parameter.numel() for _, parameter in stage_of(config, alone).named_global_parameters())
    assert built == config.spec.built_parameter_count(config.model)
    if padding == 1:
        assert built == config.spec.parameter_count(config.model)
    else:
        assert built > config.spec.parameter_count(config.model)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_named_once_and_can_be_cut(family, alone, tmp_path):
    config = config_of(family, tmp_path)
    specs = stage_of(config, alone).specs
    names = [spec.name for spec in specs]
    assert len(set(names)) == len(names)
    assert all(spec.tied_to in names[: number] for number, spec in enumerate(specs) if spec.tied_to)
    blocks = sum(spec.recompute for spec in specs)
    assert blocks == config.spec.facts(config.model).layers
    if config.spec.facts(config.model).pipeline_supported:
        costs = {spec.name: spec.cost for spec in specs}
        assert 0 < costs["embedding"] < costs["head"], "the ends count in the cut"
    for num_stages in range(1, blocks + 1):
        bounds = cut([spec.cost for spec in specs], num_stages, [spec.with_next for spec in specs])
        assert not any(specs[bound - 1].with_next for bound in bounds[1:])
        assert all(any(spec.recompute for spec in specs[begin:end])
                   for begin, end in zip(bounds[:-1], bounds[1:], strict=True) if num_stages <= blocks // 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_planned(family, alone, tmp_path):
    for name, parameter in stage_of(config_of(family, tmp_path), alone).named_global_parameters():
        assert hasattr(parameter, "plan"), name
        assert isinstance(parameter.no_decay, bool), name


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_grow_with_the_model(family, tmp_path):
    config = config_of(family, tmp_path)
    depth = "image_layers" if family == "clip" else "layers"
    larger = config_of(family, tmp_path, **{depth: 2 * getattr(config.model, depth)})
    found = [c.spec.flops_per_token(c.model, c.window_tokens) for c in (config, larger)]
    assert 6 * 10**4 < found[0] < found[1]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_objectives_of_a_family_have_its_form(family, name, tmp_path):
    assert family_spec(family).form in OBJECTIVES[name].losses
    loss = make_loss(name, family, TensorParallel(None, torch.device("cpu")))
    assert all(callable(getattr(loss, part)) for part in ("inputs", "targets", "num_targets", "loss_sum"))
    in_parts = not family_spec(family).facts(config_of(family, tmp_path).model).why_no_context
    assert callable(getattr(loss, "part", None)) == in_parts


@pytest.mark.parametrize("family", FAMILIES)
def test_context_ranks_are_taken_or_refused_with_the_reason(family, tmp_path):
    config = config_of(family, tmp_path)
    asked = config.parallel.model_copy(update={"context": 2, "global_batch": config.parallel.micro_batch})
    found = list(rules.problems(asked, config.precision, 2, config.spec.facts(config.model)))
    reason = config.spec.facts(config.model).why_no_context
    assert [(where, reason in possible, "parallel.context=1" in change) for where, _, possible, change in found] \
        == ([("parallel.context", True, True)] if reason else [])


def test_form_is_a_key_of_losses_and_nothing_else():
    """Code that depends on the family asks its FamilySpec or HFAdapter, so a new form is added in its folder alone."""
    readers = [path.relative_to(ROOT).as_posix()
               for room in ("common", "data_pipeline", "launchers", "parallel", "pretrain")
               for path in (ROOT / room).rglob("*.py")
               if any(isinstance(node, ast.Attribute) and node.attr == "form"
                      for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))))]
    assert readers == ["pretrain/objectives/__init__.py"]


@pytest.mark.parametrize("family", FAMILIES)
def test_no_other_folder_names_a_family_in_a_comparison(family):
    """Nor the family's name, nor one of its model types in transformers."""
    names = {family, *(architecture.model_type for architecture in architectures(family))}
    found = []
    for path in (ROOT / "pretrain").rglob("*.py"):
        where = path.relative_to(ROOT).as_posix()
        if where.startswith("pretrain/models/") or where == "pretrain/commands/demo.py":
            continue
        found += [f"{where}:{node.lineno}" for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                  if isinstance(node, ast.Compare)
                  and any(isinstance(part, ast.Constant) and part.value in names for part in ast.walk(node))]
    assert found == []


@pytest.mark.parametrize("family", FAMILIES)
def test_special_tokens_of_a_family_and_its_objectives_fit(family):
    adapter = hf_adapter(family)
    assert set(adapter.token_names._fields) | {"first_sentinel"} == set(SpecialIds._fields)
    for name in family_spec(family).objectives:
        special = OBJECTIVES[name].special
        roles = {*special.needed, *special.named, *special.before, *special.after, special.decoder_start}
        assert roles <= {*adapter.token_names._fields, END_OF_TEXT_ROLE}
        ids = adapter.config_token_ids(SpecialIds.at_top(100), end_of_text=3, decoder_start=99)
        assert set(ids) <= set(TOKEN_IDS) and ids["eos_token_id"] is not None


def test_special_ids_are_counted_down_from_the_top():
    assert SpecialIds.at_top(100) == (99, 98, 97, 96, 95)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objective_is_named_and_used(name):
    assert OBJECTIVES[name].config_class.model_fields["name"].default == name
    assert any(name in family_spec(family).objectives for family in FAMILIES)
