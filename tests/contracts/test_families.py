"""What every family and every objective owes to the rest of the project."""

import ast
from pathlib import Path

import pytest
import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline.corruption.special_ids import SpecialIds
from parallel.pipeline_stages import Stage, cut
from parallel.rules import table as rules
from parallel.single_rank import single_rank
from parallel.tensor_parallel import TensorParallel
from pretrain.config.run_config import load_config
from pretrain.models import FAMILIES, architectures, family_spec, hf_adapter
from pretrain.models.build import build_stage
from pretrain.models.hf_map import TOKEN_IDS
from pretrain.objectives import OBJECTIVES, make_loss
from pretrain.objectives.objective import END_OF_TEXT_ROLE
from tests.helpers.recipes import recipe_of

ROOT = Path(__file__).parents[2]
PREDICTIONS = 5
SAMPLES = {  # inputs of one sample
    "gpt": lambda model: ids(model.sequence_length),
    "t5": lambda model: (ids(model.sequence_length), ids(model.num_targets)),
    "bart": lambda model: (ids(model.sequence_length), ids(model.num_targets)),
    "bert": lambda model: (ids(model.sequence_length), ids(model.sequence_length) * 0, ids(PREDICTIONS)),
    "clip": lambda model: (torch.rand(1, 3, model.image_size, model.image_size), ids(model.sequence_length),
                           torch.tensor([3])),
}  # fmt: skip


def ids(num_tokens: int) -> torch.Tensor:
    return torch.arange(num_tokens)[None]


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
    return build_stage(config.model, groups, torch.device(device))


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


SHAPES = [  # family and fields that change what its layers are made of
    *((family, {}) for family in FAMILIES),
    ("gpt", {"positions": "rotary", "norm": "rmsnorm", "activation": "swiglu", "bias": False, "kv_heads": 2,
             "tied_head": False, "ffn": 96}),
    ("gpt", {"positions": "none", "norm_position": "post", "experts": 4, "top_k": 2, "expert_every": 3,
             "expert_ffn": 24, "shared_expert_ffn": 12, "activation": "swiglu"}),
    ("t5", {"tied_head": False, "activation": "geglu_tanh", "decoder_layers": 3, "experts": 4, "expert_every": 2}),
    ("bart", {"max_positions": 50, "decoder_layers": 3, "experts": 4}),
    ("bert", {"next_sentence": False, "segment_types": 1, "position_offset": 2}),
    ("bert", {"shared_blocks": True}),
    ("clip", {"logit_bias": None, "text_ffn": 40}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "fields"), SHAPES, ids=str)
def test_every_layer_has_the_parameters_of_its_shape(family, fields, alone, tmp_path):
    """The description without torch against the modules: layer by layer, and over the model."""
    config = config_of(family, tmp_path, pad_vocab_to=100, **fields)
    shapes = config.spec.layer_shapes(config.model)
    stage = stage_of(config, alone, "meta")
    assert {spec.name for spec in stage.specs} == set(shapes)
    for name, module in stage.owned.items():
        built, shape = sum(parameter.numel() for parameter in module.parameters()), shapes[name]
        per_token_id = getattr(shape, "per_token_id", 0)
        assert built == shape.num_parameters + per_token_id * config.model.padded_vocab_size, name
    built = sum(parameter.numel() for _, parameter in stage.named_global_parameters())
    assert built == config.spec.built_parameter_count(config.model)


@pytest.mark.parametrize(("family", "fields"), SHAPES, ids=str)
def test_products_are_those_that_torch_counts(family, fields, alone, tmp_path):
    """Multiply-adds of one sample's forward against torch's own counter, which sees every matrix product."""
    config = config_of(family, tmp_path, pad_vocab_to=100, **fields)
    stage = stage_of(config, alone)
    for parameter in stage.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        stage.run(SAMPLES[family](config.model))
    shapes = config.spec.layer_shapes(config.model, num_predictions=PREDICTIONS if family == "bert" else None)
    counted = 2 * sum(shape.multiply_adds for shape in shapes.values())
    if family == "bert" and config.model.next_sentence:
        counted += 2 * config.model.hidden * (config.model.hidden + 2)  # of the pair, which one token decides
    assert counter.get_total_flops() == counted


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_named_once_and_can_be_cut(family, alone, tmp_path):
    config = config_of(family, tmp_path)
    specs = stage_of(config, alone).specs
    names = [spec.name for spec in specs]
    assert len(set(names)) == len(names)
    assert all(spec.tied_to in names[: number] for number, spec in enumerate(specs) if spec.tied_to)
    blocks = sum(spec.recompute for spec in specs)
    assert blocks == config.spec.traits(config.model).layers
    if config.spec.traits(config.model).pipeline_supported:
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
    found = [c.spec.flops_per_unit(c.model, c.window_tokens, c.num_predictions) for c in (config, larger)]
    assert 6 * 10**4 < found[0] < found[1]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_objectives_of_a_family_have_its_form(family, name, tmp_path):
    assert family_spec(family).form in OBJECTIVES[name].losses
    loss = make_loss(OBJECTIVES[name].config_class(), config_of(family, tmp_path).model,
                     TensorParallel(None, torch.device("cpu")))
    assert all(callable(getattr(loss, part)) for part in ("inputs", "targets", "counts", "losses"))
    assert loss.terms and all(weight > 0 for weight in loss.terms.values())
    in_parts = not family_spec(family).traits(config_of(family, tmp_path).model).why_no_context
    assert callable(getattr(loss, "part", None)) == in_parts


@pytest.mark.parametrize("family", FAMILIES)
def test_context_ranks_are_taken_or_refused_with_the_reason(family, tmp_path):
    config = config_of(family, tmp_path)
    asked = config.parallel.model_copy(update={"context": 2, "global_batch": config.parallel.micro_batch})
    found = list(rules.problems(asked, config.precision, 2, config.spec.traits(config.model)))
    reason = config.spec.traits(config.model).why_no_context
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


@pytest.mark.parametrize("family", [family for family in FAMILIES if architectures(family)])
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
