"""Frozen parameters stay as they began, and what is trained beside them gives the same curve on every layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pretrain.checkpoint.store import Checkpoint
from pretrain.training.metrics import METRICS_FILE, read_metrics
from tests.helpers.ranks import train_on
from tests.helpers.recipes import recipe_of, write_recipe

pytestmark = pytest.mark.slow

STEPS = 6
EMBEDDING = ["model.freeze=[embedding.*]"]
HALF = ["model.freeze=[embedding.*, blocks.0.*, blocks.1.*]"]  # all of a first stage of two, and a tied table
EXPERTS = ["model.experts=4", "model.top_k=2", "model.freeze=[blocks.0.*, '*.experts.*.up.*', '*.router.*']"]
ENCODER = ["model.freeze=[embedding.*, encoder.*]"]
BF16, ZERO_1 = ["precision.compute=bf16"], ["parallel.zero_stage=1"]
OFFLOAD = ["parallel.offload=optimizer"]
TENSOR = ["parallel.tensor=2", *ZERO_1]
PIPELINE = ["parallel.pipeline=2"]
LAYOUTS = {  # name: ranks, overrides
    "zero0": (2, []),
    "zero1": (2, ZERO_1),
    "zero2": (2, ["parallel.zero_stage=2"]),
    "zero3": (2, ["parallel.zero_stage=3"]),
    "tensor": (2, [*TENSOR, "parallel.recompute=selective"]),
    "sequence": (2, [*TENSOR, "parallel.sequence=true"]),
    "context": (2, ["parallel.context=2", *ZERO_1]),
    "pipeline": (2, [*PIPELINE, "parallel.recompute=full"]),
    "pipeline-zero1": (4, [*PIPELINE, *ZERO_1]),
    "v-shaped": (2, [*PIPELINE, *ZERO_1, "parallel.schedule=dualpipev", "parallel.micro_batch=1"]),
    "offload": (2, [*ZERO_1, *OFFLOAD, "parallel.recompute=selective"]),
    "bf16": (2, [*ZERO_1, *BF16]),
    "bf16-zero3": (2, ["parallel.zero_stage=3", *BF16]),
    "bf16-pipeline": (2, [*PIPELINE, *ZERO_1, *BF16, *OFFLOAD]),
}
CASES = [
    *(("gpt", HALF, name) for name in LAYOUTS),
    # the table alone: the first stage keeps trained parameters, and a tied head has none of its own
    *(("gpt", EMBEDDING, name) for name in ("zero1", "zero3", "sequence", "context", "pipeline", "pipeline-zero1")),
    ("gpt", EXPERTS, "experts"),
    ("gpt", EXPERTS, "experts-pipeline"),
    ("gpt", EXPERTS, "zero3"),
    ("t5", ENCODER, "pipeline"),
    ("t5", ENCODER, "pipeline-zero1"),
]  # fmt: skip
LAYOUTS |= {"experts": (2, [*ZERO_1, "parallel.expert=2", "parallel.recompute=full"]),
            "experts-pipeline": (4, [*PIPELINE, *ZERO_1, "parallel.expert=2", "parallel.recompute=selective"])}


def train(folder: Path, dataset: Path, family: str, ranks: int, options: list[str]) -> list[dict]:
    """The records of a run in `folder`, which may hold the beginning of it."""
    folder.mkdir(exist_ok=True)
    recipe = write_recipe(folder / "recipe.yaml", dataset, recipe_of(family))
    codes = train_on(ranks, recipe, [f"run.dir={folder / 'run'}", f"run.steps={STEPS}", "schedule.warmup_steps=2",
                                     "schedule.decay_steps=100", "optimizer.lr=1e-3", "run.check_every=3", *options])
    assert codes == [0] * ranks
    return read_metrics(folder / "run" / METRICS_FILE)


def weights(folder: Path, step: int) -> Checkpoint:
    return Checkpoint(folder / "run" / "checkpoints" / f"step-{step:08}")


@pytest.fixture(scope="module")
def reference(dataset, tmp_path_factory):
    """(records, folder) of one rank by family and options, each run once."""
    known: dict[tuple, tuple] = {}

    def of(family: str, options: list[str]) -> tuple[list[dict], Path]:
        key = (family, *options)
        if key not in known:
            folder = tmp_path_factory.mktemp(family)
            known[key] = train(folder, dataset, family, 1, options), folder
        return known[key]

    return of


def frozen_names(checkpoint: Checkpoint) -> set[str]:
    """What is stored without moments."""
    return {name for name in checkpoint.shapes if (name, "exp_avg") not in checkpoint._stored}


@pytest.mark.parametrize(("family", "options", "layout"), CASES, ids=lambda value: str(value).replace(" ", ""))
def test_the_curve_is_the_same(family, options, layout, tmp_path, dataset, reference):
    ranks, extra = LAYOUTS[layout]
    expected, folder = reference(family, options)
    found = train(tmp_path, dataset, family, ranks, [*options, *extra])
    bound = 2e-2 if BF16[0] in extra else 1e-5
    assert expected[-1]["loss"] < expected[0]["loss"] - 0.02, "the reference did not learn"
    assert [record["loss"] for record in found] == pytest.approx([record["loss"] for record in expected], rel=bound)
    if bound < 1e-2:
        assert [r["grad_norm"] for r in found] == pytest.approx([r["grad_norm"] for r in expected], rel=10 * bound)
    ours, theirs = weights(tmp_path, STEPS), weights(folder, STEPS)
    assert set(ours.shapes) == set(theirs.shapes)
    names = frozen_names(theirs)
    assert names == frozen_names(ours) and 0 < len(names) < len(theirs.shapes)
    assert not ours.incomplete()
    for name in names:
        assert torch.equal(ours.tensor(name), theirs.tensor(name)), name


@pytest.mark.parametrize(("options", "layout"), [(HALF, "zero3"), (HALF, "bf16-pipeline"), (EXPERTS, "experts")],
                         ids=lambda value: str(value).replace(" ", ""))  # fmt: skip
def test_frozen_weights_are_the_same_after_100_steps(options, layout, tmp_path, dataset, reference):
    ranks, extra = LAYOUTS[layout]
    train(tmp_path, dataset, "gpt", ranks, [*options, *extra, "run.steps=100", "model.hidden=32"])
    _, folder = reference("gpt", [*options, "model.hidden=32"])
    late, early = weights(tmp_path, 100), weights(folder, STEPS)
    names = frozen_names(early)
    assert names == frozen_names(late)
    for name in late.shapes:
        assert torch.equal(late.tensor(name), early.tensor(name)) == (name in names), name


@pytest.mark.parametrize(("first", "second"), [("pipeline-zero1", "zero3"), ("bf16-pipeline", "sequence"),
                                               ("bf16-zero3", "zero0")])
def test_a_checkpoint_goes_to_another_layout(first, second, tmp_path, dataset, reference):
    expected, folder = reference("gpt", HALF)
    ranks, extra = LAYOUTS[first]
    train(tmp_path, dataset, "gpt", ranks, [*HALF, *extra, "run.steps=3"])
    ranks, other = LAYOUTS[second]
    found = train(tmp_path, dataset, "gpt", ranks, [*HALF, *other])
    bound = 2e-2 if BF16[0] in extra else 1e-5
    assert [record["loss"] for record in found] == pytest.approx([record["loss"] for record in expected], rel=bound)
    between, ours, theirs = weights(tmp_path, 3), weights(tmp_path, STEPS), weights(folder, STEPS)
    for name in frozen_names(theirs):
        assert torch.equal(between.tensor(name), theirs.tensor(name)), name
        assert torch.equal(ours.tensor(name), theirs.tensor(name)), name


def test_a_pattern_that_matches_nothing_ends_every_rank_before_training(tmp_path, recipe):
    assert train_on(2, recipe, [f"run.dir={tmp_path}", "model.freeze=[embeding.*]"]) == [2, 2]
    assert not (tmp_path / METRICS_FILE).exists()


@pytest.mark.parametrize("layout", ["zero1", "zero3"])
def test_a_frozen_image_tower(layout, tmp_path, shapes):
    """With gradients of embeddings that a first pass has made: those of the frozen tower lead nowhere."""
    options = ["model.freeze=[image.*]", "run.steps=4", "parallel.micro_batch=4"]
    ranks, extra = LAYOUTS[layout]
    expected, found = (train(tmp_path / name, shapes, "clip", ranks, [*options, *more])
                       for name, ranks, more in (("one", 1, []), ("many", ranks, extra)))
    assert [record["loss"] for record in found] == pytest.approx([record["loss"] for record in expected], rel=1e-5)
    assert [r["grad_norm"] for r in found] == pytest.approx([r["grad_norm"] for r in expected], rel=1e-4)
