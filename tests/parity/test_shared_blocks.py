"""One block's weights for all blocks (ALBERT): the curve of one rank on every layout, and one copy in a checkpoint."""

from __future__ import annotations

import pytest

from pretrain.checkpoint.reader import Checkpoint
from tests.helpers.ranks import train_on
from tests.helpers.recipes import recipe_of, write_recipe
from tests.helpers.runs import Case, check_reference, check_same, read_run

pytestmark = pytest.mark.slow

STEPS = 10
SHARED = ["model.shared_blocks=true", "optimizer.lr=2e-3", f"run.steps={STEPS}", "schedule.warmup_steps=2",
          f"schedule.decay_steps={STEPS}"]
CASES = [
    (Case(tensor=2, sequence=True), ["parallel.recompute=full"]),
    (Case(data=2), ["parallel.recompute=selective"]),
    (Case(data=2, zero=2), []),
    (Case(data=2, zero=3), ["parallel.recompute=full"]),
    (Case(pipeline=2), []),
    (Case(tensor=2, pipeline=2, zero=1, sequence=True), ["parallel.recompute=full"]),
    (Case(pipeline=2, data=2, zero=1), ["parallel.offload=optimizer"]),
    (Case(pipeline=4, zero=1), []),
    (Case(pipeline=2, zero=1), ["parallel.schedule=dualpipev"]),
]  # fmt: skip


@pytest.fixture
def reference(runs):
    found = runs.reference("bert", SHARED)
    check_reference(found, learnt=0.1)
    return found


@pytest.mark.parametrize(("case", "extra"), CASES, ids=str)
def test_fp32_curve_is_the_same(case, extra, runs, reference):
    check_same(runs.on(case, "bert", [*SHARED, *extra]), reference)


def test_bf16_in_a_pipeline_is_close(runs, reference):
    found = runs.on(Case(pipeline=2, zero=1), "bert", [*SHARED, "precision.compute=bf16"])
    assert found.losses == pytest.approx(reference.losses, rel=2e-2)


def test_a_checkpoint_has_the_block_once_and_goes_on_in_a_pipeline(dataset, reference, tmp_path):
    bert = write_recipe(tmp_path / "recipe.yaml", dataset, recipe_of("bert"))
    common = [*SHARED, f"run.dir={tmp_path / 'run'}", f"checkpoint.every={STEPS // 2}"]
    assert train_on(1, bert, [*common, f"run.steps={STEPS // 2}"]) == [0]
    (folder,) = (tmp_path / "run" / "checkpoints").iterdir()
    blocks = {name.split(".")[1] for name in Checkpoint(folder).shapes if name.startswith("blocks.")}
    assert blocks == {"0"}
    assert train_on(2, bert, [*common, "parallel.pipeline=2", "parallel.zero_stage=1"]) == [0, 0]
    check_same(read_run(tmp_path / "run"), reference)
