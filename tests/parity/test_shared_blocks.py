"""One block's weights for all blocks (ALBERT): the curve of one rank on every layout, and one copy in a checkpoint."""

from __future__ import annotations

import pytest

from pretrain.checkpoint.store import Checkpoint
from pretrain.training.metrics import read_metrics
from tests.helpers.ranks import train_on
from tests.helpers.recipes import recipe_of, write_recipe
from tests.parity.test_layouts import curve, largest_differences

SHARED = ["model.shared_blocks=true", "run.steps=20", "optimizer.lr=2e-3"]
ONE = (1, 1, 1, 0, False)
CASES = [  # (tensor, pipeline, data, ZeRO stage, sequence), overrides
    ((2, 1, 1, 0, True), ["parallel.recompute=full"]),
    ((1, 1, 2, 0, False), ["parallel.recompute=selective"]),
    ((1, 1, 2, 2, False), []),
    ((1, 1, 2, 3, False), ["parallel.recompute=full"]),
    ((1, 2, 1, 0, False), []),
    ((2, 2, 1, 1, True), ["parallel.recompute=full"]),
    ((1, 2, 2, 1, False), ["parallel.offload=optimizer"]),
    ((1, 4, 1, 1, False), []),
    ((1, 2, 1, 1, False), ["parallel.schedule=dualpipev"]),
]  # fmt: skip


@pytest.fixture(scope="module")
def bert(dataset, tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("recipe") / "recipe.yaml", dataset, recipe_of("bert"))


@pytest.fixture(scope="module")
def reference(bert, tmp_path_factory):
    return curve(tmp_path_factory.mktemp("reference"), ONE, bert, SHARED)


def check(found, expected):
    assert expected[-1][0] < expected[0][0] - 0.3, "the reference did not learn, so equality would prove little"
    loss, norm = largest_differences(found, expected)
    assert loss <= 1e-5, f"loss differs by {loss:.1e}, gradient norm by {norm:.1e}"
    assert norm <= 1e-4, f"gradient norm differs by {norm:.1e}, loss by {loss:.1e}"


@pytest.mark.parametrize(("layout", "extra"), CASES, ids=str)
def test_fp32_curve_is_the_same(layout, extra, bert, reference, tmp_path):
    check(curve(tmp_path, layout, bert, [*SHARED, *extra]), reference)


def test_bf16_in_a_pipeline_is_close(bert, reference, tmp_path):
    found = curve(tmp_path, (1, 2, 1, 1, False), bert, [*SHARED, "precision.compute=bf16"])
    assert largest_differences(found, reference)[0] <= 2e-2


def test_a_checkpoint_has_the_block_once_and_goes_on_in_a_pipeline(bert, reference, tmp_path):
    common = [f"run.dir={tmp_path / 'run'}", *SHARED[::2], "schedule.decay_steps=20", "checkpoint.every=10"]
    assert train_on(1, bert, [*common, "run.steps=10"]) == [0]
    (folder,) = (tmp_path / "run" / "checkpoints").iterdir()
    blocks = {name.split(".")[1] for name in Checkpoint(folder).shapes if name.startswith("blocks.")}
    assert blocks == {"0"}
    assert train_on(2, bert, [*common, "run.steps=20", "parallel.pipeline=2", "parallel.zero_stage=1"]) == [0, 0]
    check([(record["loss"], record["grad_norm"]) for record in read_metrics(tmp_path / "run" / "metrics.jsonl")],
          reference)
