"""CLIP through `trainyard train`: the same curve on every layout, with and without micro-batches, after a restart."""

from __future__ import annotations

import pytest

from common.errors import ConfigError
from pretrain.config.run_config import load_run
from pretrain.training.metrics import EVALUATIONS_FILE, read_metrics
from tests.helpers.recipes import CLIP, write_recipe
from tests.helpers.runs import ONE, SHORT, Case, check_reference, check_same, read_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def clip(shapes, tmp_path_factory):
    """Its rate is half of that of the other families."""
    return write_recipe(tmp_path_factory.mktemp("clip") / "clip.yaml", shapes, CLIP)


WHOLE = "parallel.micro_batch=16"  # one micro-batch a step: no second pass
OPTIONS = (*SHORT, "parallel.micro_batch=4", "parallel.global_batch=16", "optimizer.lr=1e-3")


@pytest.fixture
def reference(runs):
    found = runs("clip", 1, [*OPTIONS, WHOLE])
    check_reference(found, learnt=0.15)
    return found


@pytest.mark.parametrize(("case", "extra"), [
    (ONE, []), (Case(tensor=2, data=2, zero=1, sequence=True), []), (Case(data=2, zero=3), []),
    (Case(data=2, zero=2), ["parallel.micro_batch=8"]), (Case(tensor=2), ["parallel.recompute=full"]),
    (Case(tensor=4, zero=1, sequence=True), [WHOLE]),
], ids=str)  # fmt: skip
def test_fp32_curve_is_the_same(case, extra, runs, reference):
    check_same(runs.on(case, "clip", [*OPTIONS, *extra]), reference)


@pytest.mark.parametrize("case", [ONE, Case(tensor=2, data=2, zero=1, sequence=True), Case(data=2, zero=3)], ids=str)
def test_bf16_curve_is_close(case, runs, reference):
    found = runs.on(case, "clip", [*OPTIONS, "precision.compute=bf16"])
    assert found.losses == pytest.approx(reference.losses, rel=2e-2)
    assert found.losses != reference.losses


def test_a_restart_on_another_layout_goes_on(tmp_path, clip, trainer, reference):
    folder = tmp_path / "run"
    # 3 steps of a run of 6: the schedule must not shrink with them
    common = [f"run.dir={folder}", *SHORT, "schedule.decay_steps=6", "log.evaluate_every=3", "log.evaluate_samples=20",
              "checkpoint.every=3"]
    assert trainer.on_ranks(2, clip, [*common, "run.steps=3"]) == [0, 0]
    assert trainer.on_ranks(1, clip, common) == [0]
    found = read_run(folder)
    assert found.losses == pytest.approx(reference.losses, rel=1e-5)
    assert found.steps[-1]["samples"] == 6 * 16
    assert "samples_per_second" in found.steps[-1]
    assert [record["step"] for record in read_metrics(folder / EVALUATIONS_FILE)] == [0, 3, 6]


def test_heldout_loss_is_that_of_one_batch_on_any_layout(tmp_path, clip, trainer):
    found = []
    for ranks, micro_batch in ((1, 16), (2, 4)):
        folder = tmp_path / str(ranks)
        overrides = [f"run.dir={folder}", "run.steps=1", "log.evaluate_every=1", f"parallel.micro_batch={micro_batch}",
                     "log.evaluate_samples=20"]
        assert trainer.on_ranks(ranks, clip, overrides) == [0] * ranks
        found.append([record["heldout_loss"] for record in read_metrics(folder / EVALUATIONS_FILE)])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_a_pipeline_is_refused_with_the_reason(clip):
    with pytest.raises(ConfigError) as refused:
        load_run(clip, ["parallel.pipeline=2"], 2)
    (problem,) = refused.value.problems
    assert problem.where.startswith("parallel.pipeline")
    assert "whole global batch" in problem.possible
    assert "zero_stage" in problem.possible
    assert "tensor" in problem.possible
