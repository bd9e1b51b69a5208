"""Context parallelism: ranks that share out a sequence give the curve of one that has it whole."""

from __future__ import annotations

import pytest

from tests.helpers.recipes import VOCAB_SIZE, recipe_of, write_recipe
from tests.helpers.runs import EVALUATED, SHORT, Case, check_reference, check_same, read_run
from tests.parity.test_layouts import BF16, LLAMA, UNTIED, curve

pytestmark = pytest.mark.slow

OPTIONS = (*SHORT, *EVALUATED)
PREFIXED = [f"model.vocab_size={VOCAB_SIZE + 32}", "objective.name=prefix_lm"]
CASES = [  # where; what makes the model another, or must change nothing
    (Case(context=2), []), (Case(context=4, zero=1), [*UNTIED, "parallel.offload=optimizer"]),
    (Case(context=2, data=2, zero=3), []),
    (Case(tensor=2, context=2, zero=1), []), (Case(tensor=2, context=2, zero=1, sequence=True), LLAMA),
    (Case(tensor=2, context=2, zero=3, sequence=True), []),
    (Case(context=2, pipeline=2, zero=1), ["parallel.loss_chunk_tokens=12", "parallel.schedule=dualpipev"]),
    (Case(tensor=2, context=2, sequence=True), PREFIXED),
]  # fmt: skip


@pytest.mark.parametrize(("case", "extra"), CASES, ids=str)
def test_fp32_curve_is_the_same(case, extra, runs):
    expected = runs.reference("gpt", [*OPTIONS, *extra])
    check_reference(expected, learnt=0.1)
    assert len(expected.heldout) == 2
    check_same(runs.on(case, "gpt", [*OPTIONS, *extra]), expected)


@pytest.mark.parametrize("case", [Case(tensor=2, context=2, zero=1, sequence=True), Case(context=2)], ids=str)
def test_bf16_curve_is_close(case, runs):
    found = runs.on(case, "gpt", [*SHORT, *BF16, "precision.reduce=compute"])
    assert found.losses == pytest.approx(runs.reference("gpt", [*SHORT, *BF16]).losses, rel=2e-2)


def test_recompute_changes_nothing(runs):
    options = ["run.steps=4", "model.attention_dropout=0.1", "model.dropout=0.1"]
    plain = curve(runs.on(Case(context=2), "gpt", options))
    for kind in ("full", "selective"):
        assert curve(runs.on(Case(context=2), "gpt", [*options, f"parallel.recompute={kind}"])) == plain


def test_a_checkpoint_goes_on_without_context_ranks(tmp_path, dataset, trainer, runs):
    """Written by 2 x 2 ranks under ZeRO-3, read by one."""
    recipe = write_recipe(tmp_path / "gpt.yaml", dataset, recipe_of("gpt"))
    keep = [f"run.dir={tmp_path / 'run'}", *SHORT, "schedule.decay_steps=6", "checkpoint.every=3"]
    four = [*keep, "run.steps=3", *Case(context=2, data=2, zero=3).overrides]
    assert trainer.on_ranks(4, recipe, four) == [0] * 4
    assert trainer.on_ranks(1, recipe, keep) == [0]
    found = read_run(tmp_path / "run")
    check_same(found, runs.reference("gpt", SHORT))
    assert found.steps[-1]["tokens"] == 6 * 8 * 32, "tokens count once, not once for each context rank"


def test_a_long_sequence_over_four_ranks(runs):
    """16,384 tokens, of which no rank holds more than 4,096 outside attention."""
    long = ["model.sequence_length=16384", "model.layers=1", "model.hidden=32", "parallel.micro_batch=1",
            "parallel.global_batch=1", "run.steps=1", "data.heldout=null"]
    check_same(runs(family="gpt", num_ranks=4, overrides=["parallel.context=4", *long]), runs("gpt", 1, long))
