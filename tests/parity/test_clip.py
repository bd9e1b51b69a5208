"""CLIP through `trainyard train`: the same curve on every layout, with and without micro-batches, after a restart."""

from __future__ import annotations

import pytest

from common.errors import ConfigError
from pretrain.config.run_config import load_run
from pretrain.training.metrics import EVALUATIONS_FILE, read_metrics
from tests.helpers.ranks import train_on
from tests.helpers.recipes import CLIP, write_recipe
from tests.parity.test_layouts import curve, largest_differences

ONE = (1, 1, 1, 0, False)


@pytest.fixture(scope="module")
def clip(shapes, tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("clip") / "clip.yaml", shapes, CLIP)


@pytest.fixture(scope="module")
def reference(clip, tmp_path_factory):
    found = curve(tmp_path_factory.mktemp("reference"), ONE, clip, ["parallel.micro_batch=16"])
    assert found[-1][0] < found[0][0] - 0.5, "the reference did not learn, so equality would prove little"
    assert any(norm > 1.0 for _, norm in found), "clipping never acted"
    return found


@pytest.mark.parametrize(("layout", "extra"), [
    (ONE, []), ((2, 1, 2, 1, True), []), ((1, 1, 2, 3, False), []), ((1, 1, 2, 2, False), ["parallel.micro_batch=8"]),
    ((2, 1, 1, 0, False), ["parallel.recompute=full"]), ((4, 1, 1, 1, True), ["parallel.micro_batch=16"]),
], ids=str)  # fmt: skip
def test_fp32_curve_is_the_same(layout, extra, tmp_path, clip, reference):
    loss, norm = largest_differences(curve(tmp_path, layout, clip, extra), reference)
    assert loss <= 1e-5, f"loss differs by {loss:.1e}, gradient norm by {norm:.1e}"
    assert norm <= 1e-4, f"gradient norm differs by {norm:.1e}, loss by {loss:.1e}"


@pytest.mark.parametrize("layout", [ONE, (2, 1, 2, 1, True), (1, 1, 2, 3, False)], ids=str)
def test_bf16_curve_is_close(layout, tmp_path, clip, reference):
    loss, _ = largest_differences(curve(tmp_path, layout, clip, ["precision.compute=bf16"]), reference)
    assert 0 < loss <= 2e-2


def test_a_restart_on_another_layout_goes_on(tmp_path, clip, reference):
    plain = ["log.evaluate_every=12", "log.evaluate_samples=20", "checkpoint.every=12"]
    folder = tmp_path / "run"
    # 12 steps of a run of 24: the schedule must not shrink with them
    assert train_on(2, clip, [f"run.dir={folder}", "run.steps=12", "schedule.decay_steps=24", *plain]) == [0, 0]
    assert train_on(1, clip, [f"run.dir={folder}", "run.steps=24", "schedule.decay_steps=24", *plain]) == [0]
    records = read_metrics(folder / "metrics.jsonl")
    found = [(record["loss"], record["grad_norm"]) for record in records]
    assert largest_differences(found, reference)[0] <= 1e-5
    assert records[-1]["samples"] == 24 * 16
    assert "samples_per_second" in records[-1]
    evaluations = read_metrics(folder / EVALUATIONS_FILE)
    assert [record["step"] for record in evaluations] == [0, 12, 24]


def test_heldout_loss_is_that_of_one_batch_on_any_layout(tmp_path, clip):
    found = []
    for ranks, micro_batch in ((1, 16), (2, 4)):
        folder = tmp_path / str(ranks)
        assert set(train_on(ranks, clip, [f"run.dir={folder}", "run.steps=1", "log.evaluate_every=1",
                                          f"parallel.micro_batch={micro_batch}", "log.evaluate_samples=20"])) == {0}
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
