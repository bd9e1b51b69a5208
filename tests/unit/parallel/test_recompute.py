"""Recompute: the same bits in every family, and what each kind keeps."""

import pytest
import torch

from parallel.parameter_plan import draw
from parallel.pipeline_stages import Stage
from parallel.recompute import Recomputable, recompute_selectively, recomputed
from parallel.single_rank import single_rank
from pretrain.config.run_config import config_from
from pretrain.models.build import build_stage
from tests.helpers.recipes import recipe_of

INPUTS = {
    "gpt": lambda: ids(3, 32),
    "t5": lambda: (ids(3, 32), ids(3, 12), torch.ones(3, 32, dtype=torch.long)),
    "bart": lambda: (ids(3, 32), ids(3, 32), torch.ones(3, 32, dtype=torch.long)),
    "bert": lambda: (ids(3, 32), torch.zeros(3, 32, dtype=torch.long), torch.randint(32, (3, 4))),
    "clip": lambda: (torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8), ids(3, 15), torch.randint(15, (3,))),
}
DROPOUT = {"dropout": 0.1, "attention_dropout": 0.1}
SHAPES = [("gpt", {**DROPOUT, "activation": "swiglu", "norm": "rmsnorm", "positions": "rotary", "kv_heads": 2}),
          ("gpt", {**DROPOUT, "norm_position": "post", "activation": "relu"}), ("t5", {}), ("t5", DROPOUT),
          ("bart", DROPOUT), ("bert", DROPOUT), ("clip", {})]  # fmt: skip


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(500, shape)


@pytest.fixture(scope="module")
def alone():
    with single_rank() as groups:
        yield groups


def stage_of(groups, family: str, changes: dict) -> Stage:
    content = recipe_of(family)
    config = config_from({**content, "model": {**content["model"], **changes}, "data": {"train": "none"}}, "test")
    stage = build_stage(config.model, groups, torch.device("cpu"))
    with torch.no_grad():
        for name, parameter in stage.named_global_parameters():
            parameter.copy_(draw(name, tuple(parameter.shape), parameter.plan, 3))
    return stage


def tensors(outputs) -> tuple[torch.Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def results(stage: Stage, mode: str, family: str) -> list[torch.Tensor]:
    """Outputs and every gradient of one pass with the same inputs and the same dropout."""
    for spec in stage.specs:
        for part in stage.by_name[spec.name].modules():
            if isinstance(part, Recomputable):
                part.selective = False
        if spec.recompute and mode == "selective":
            recompute_selectively(stage.by_name[spec.name])
    wrapped = {spec.name: recomputed(stage.by_name[spec.name]) for spec in stage.specs
               if spec.recompute and mode == "full"}
    torch.manual_seed(5)
    outputs = tensors(stage.run(INPUTS[family](), wrapped))
    sum(output.float().square().mean() for output in outputs).backward()
    found = [*outputs, *(parameter.grad for _, parameter in stage.named_global_parameters())]
    stage.zero_grad()
    return found


@pytest.mark.parametrize(("family", "changes"), SHAPES, ids=str)
def test_same_bits_as_without(family, changes, alone):
    stage = stage_of(alone, family, changes)
    expected = results(stage, "none", family)
    assert all(torch.isfinite(tensor).all() for tensor in expected)
    for mode in ("selective", "full"):
        found = results(stage, mode, family)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), mode


def test_a_second_backward_finds_what_it_needs(alone):
    """A pipeline stage with two outputs runs the graph that both need twice."""
    stage = stage_of(alone, "bart", {})
    for spec in stage.specs:
        recompute_selectively(stage.by_name[spec.name])
    logits = stage.run(INPUTS["bart"]())
    weight = stage.by_name["encoder.blocks.0"].feed_forward.up.weight
    first, = torch.autograd.grad(logits.square().mean(), weight, retain_graph=True)
    second, = torch.autograd.grad(logits.square().mean(), weight)
    assert torch.equal(first, second)


def test_nothing_is_kept_without_a_backward(alone):
    stage = stage_of(alone, "gpt", {"activation": "swiglu"})
    for spec in stage.specs:
        recompute_selectively(stage.by_name[spec.name])
    inputs = INPUTS["gpt"]()
    with torch.no_grad():
        without = stage.run(inputs)
    assert torch.equal(without, stage.run(inputs))
