"""A mixture of experts gives the curve of the dense loop over experts on one rank, however its experts are spread."""

from __future__ import annotations

import pytest

from tests.helpers.ranks import run_ranks
from tests.helpers.recipes import recipe_of, write_recipe
from tests.helpers.runs import ONE, SHORT, SHORT_STEPS, Case, Run, check_reference, read_run

pytestmark = pytest.mark.slow

TOP_2 = ("model.experts=4", "model.top_k=2", "model.router=top_k_softmax", "model.expert_every=2",
         "model.expert_ffn=96", "model.z_loss=1e-3", "run.check_every=3")  # fmt: skip
TOP_1 = ("model.experts=4", "model.capacity_factor=1.0", "model.bias_rate=1e-3", "model.shared_expert_ffn=32",
         "model.balance_loss=0.05")  # fmt: skip
SURE = 3  # steps that are equal however near two experts came: one such token was seen in the fifth
ROUTING = ("balance_loss", "z_loss", "expert_load_max", "dropped_fraction", "router_entropy")


def check(found: Run, expected: Run, bound: float = 1e-5) -> None:
    """The curves are equal up to a step where one token's two likeliest experts were equal to rounding, and either was
    taken (seen in the loads, which are counts); behind it they are two runs, and near each other.
    """
    count = len(expected.steps)
    assert len(found.steps) == count
    check_reference(expected, learnt=0.4 if count > SHORT_STEPS else 0.1)
    loads = zip(*([record["expert_load"] for record in run.steps] for run in (found, expected)), strict=True)
    equal = next((step for step, (one, other) in enumerate(loads) if one != pytest.approx(other, abs=1e-6)), count)
    assert equal >= SURE, f"tokens went elsewhere at step {equal + 1}"
    assert any(record["grad_norm"] > 1 for record in expected.steps[:equal]), "clipping never acted"
    for key, share in (("loss", 1), ("grad_norm", 10), *((name, 10) for name in ROUTING)):
        one, other = ([record[key] for record in run.steps[:equal]] for run in (found, expected))
        assert one == pytest.approx(other, rel=share * bound, abs=1e-9), key
    assert found.losses == pytest.approx(expected.losses, rel=1e-2)


def short(runs, family: str, case: Case, options: tuple[str, ...]) -> Run:
    return runs.on(case, family, [*SHORT, *options])


@pytest.mark.parametrize(("options", "case"), [
    (TOP_2, Case(data=2, zero=0, expert=2)),
    (TOP_2, Case(data=2, zero=3)),
    (TOP_2, Case(data=4, zero=1, expert=2)),
    (TOP_2, Case(data=4, zero=2, expert=4)),
    (TOP_2, Case(tensor=2, data=2, zero=1, expert=2, sequence=True)),
    (TOP_2, Case(pipeline=2, data=2, zero=1, expert=2)),
    ((*TOP_2[:3], "model.expert_every=4"), Case(pipeline=2, data=2, zero=1, expert=2)),  # experts on one stage only
    (TOP_1, Case(tensor=2, data=2, zero=0, expert=2)),
    (TOP_1, Case(data=2, zero=2, expert=2)),
    (TOP_1, Case(tensor=2, pipeline=2, zero=0, sequence=True)),
], ids=lambda value: str(value) if isinstance(value, Case) else value[1][6:])  # fmt: skip
def test_fp32_curve_is_the_same(options, case, runs):
    check(short(runs, "gpt", case, options), short(runs, "gpt", ONE, options))


@pytest.mark.parametrize(("options", "case"), [
    (TOP_2, Case(data=2, zero=1, expert=2)), (TOP_1, Case(tensor=2, data=2, expert=2)),
], ids=lambda value: str(value) if isinstance(value, Case) else value[1][6:])  # fmt: skip
def test_fp32_curve_is_the_same_over_24_steps(options, case, runs):
    """The bias of the router and the balance of loads take their time."""
    check(runs.on(case, "gpt", options), runs.on(ONE, "gpt", options))


def test_the_reference_drops_and_balances(runs):
    """Otherwise equality of those figures would prove little."""
    top_1, top_2 = (runs.on(ONE, "gpt", options).steps for options in (TOP_1, TOP_2))
    assert all(0.01 < record["dropped_fraction"] < 0.9 for record in top_1)
    assert {record["dropped_fraction"] for record in top_2} == {0.0}
    assert all(sum(record["expert_load"]) == pytest.approx(1) for record in top_1 + top_2)
    assert all(record["balance_loss"] > 0.99 and record["expert_load_max"] >= 1 for record in top_1 + top_2)


def test_encoder_decoder_with_recompute(runs):
    options = ("model.experts=4", "model.top_k=2", "model.expert_every=2", "optimizer.lr=2e-3")
    case = Case(tensor=2, data=2, zero=1, expert=2, sequence=True)
    check(short(runs, "t5", case, (*options, "parallel.recompute=full")), short(runs, "t5", ONE, options))


@pytest.mark.parametrize("case", [Case(data=2, zero=2, expert=2), Case(pipeline=2, data=2, zero=1, expert=2)], ids=str)
def test_with_what_saves_memory(case, runs):
    """Offload, selective recompute and logits in chunks beside experts."""
    saving = ("parallel.offload=optimizer", "parallel.recompute=selective", "parallel.loss_chunk_tokens=24")
    check(short(runs, "gpt", case, (*TOP_2, *saving)), short(runs, "gpt", ONE, TOP_2))


def test_in_a_v_shaped_pipeline(runs):
    v_shaped = ("parallel.schedule=dualpipev", "parallel.micro_batch=1")
    case = Case(pipeline=2, data=2, zero=1, expert=2)
    check(short(runs, "gpt", case, (*TOP_2, *v_shaped)), short(runs, "gpt", ONE, TOP_2))


@pytest.mark.parametrize("case", [Case(data=2, zero=1, expert=2), Case(data=2, zero=0, expert=2)], ids=str)
def test_bf16_curve_is_close(case, runs):
    found = short(runs, "gpt", case, (*TOP_2, "precision.compute=bf16"))
    expected = short(runs, "gpt", ONE, TOP_2)
    assert found.losses == pytest.approx(expected.losses, rel=2e-2)
    assert found.losses != expected.losses


def test_a_restart_with_experts_elsewhere_goes_on(dataset, tmp_path, trainer, runs):
    recipe = write_recipe(tmp_path / "recipe.yaml", dataset, recipe_of("gpt"))
    common = [f"run.dir={tmp_path / 'run'}", *SHORT, *TOP_1, "schedule.decay_steps=6", "checkpoint.every=3"]
    spread = Case(data=2, zero=1, expert=2)
    assert set(trainer.on_ranks(2, recipe, [*common, *spread.overrides, "run.steps=3"])) == {0}
    assert trainer.on_ranks(1, recipe, common) == [0]
    check(read_run(tmp_path / "run"), short(runs, "gpt", ONE, TOP_1))


def poisoned_step(info, values: dict) -> str:
    """What a step says when one router's weight is not a number."""
    import torch

    from common.errors import NotFinite
    from parallel.layout import Layout
    from parallel.process_groups import build_groups
    from parallel.ranks.rendezvous import join
    from pretrain.config.run_config import config_from
    from pretrain.training.build_engine import build_engine

    config = config_from(values, "test")
    join(info)
    engine = build_engine(config, build_groups(Layout.of(config.parallel, info.world_size)), torch.device("cpu"))
    with torch.no_grad():
        dict(engine.stage.named_global_parameters())["blocks.1.feed_forward.router.weight"][2, 3] = float("nan")
    tokens = torch.randint(512, (2, 33), generator=torch.Generator().manual_seed(info.rank))
    try:
        engine.train_step([{"tokens": tokens}], 1, 1e-3)
    except NotFinite as error:
        return str(error)
    return "no error"


def test_a_router_that_is_not_a_number_stops_every_rank():
    values = recipe_of("gpt")
    values = {**values, "data": {"train": "none"},
              "model": {**values["model"], "experts": 4, "top_k": 2, "capacity_factor": 1.0},
              "parallel": {"micro_batch": 2, "global_batch": 4, "expert": 2, "zero_stage": 1}}
    assert run_ranks(poisoned_step, 2, values) == ["the gradient norm is nan"] * 2
