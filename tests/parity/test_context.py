"""Context parallelism: ranks that share out a sequence give the curve of one that has it whole."""

from __future__ import annotations

import pytest

from pretrain.training.metrics import EVALUATIONS_FILE, read_metrics
from tests.helpers.ranks import train_on
from tests.helpers.recipes import VOCAB_SIZE
from tests.parity.test_layouts import LLAMA, UNTIED, curve, largest_differences

ONE = (1, 1, 1, 0, False)
EVALUATED = ["log.evaluate_every=24", "log.evaluate_samples=5"]
PREFIXED = [f"model.vocab_size={VOCAB_SIZE + 32}", "objective.name=prefix_lm"]
CASES = [  # tensor, context, pipeline, data, ZeRO stage, sequence; what makes the model another
    ((1, 2, 1, 1, 0, False), []), ((1, 4, 1, 1, 1, False), [*UNTIED, "parallel.offload=optimizer"]),
    ((1, 2, 1, 2, 3, False), []),
    ((2, 2, 1, 1, 1, False), []), ((2, 2, 1, 1, 1, True), LLAMA), ((2, 2, 1, 1, 3, True), []),
    ((1, 2, 2, 1, 1, False), ["parallel.loss_chunk_tokens=12", "parallel.schedule=dualpipev"]),
    ((2, 2, 1, 1, 0, True), PREFIXED),
]  # fmt: skip


def context_curve(folder, layout, recipe, extra=()):
    """As `curve`, with the context degree after the tensor degree."""
    tensor, context, pipeline, data, stage, sequence = layout
    return curve(folder, (tensor, pipeline, context * data, stage, sequence), recipe,
                 [f"parallel.context={context}", *extra])


def heldout(folder):
    """The held-out losses of the only run in a folder."""
    (path,) = folder.glob(f"*/{EVALUATIONS_FILE}")
    return [record["heldout_loss"] for record in read_metrics(path)]


@pytest.fixture(scope="module")
def reference(tmp_path_factory, recipe):
    """Curve and held-out losses of one rank by options, each run once."""
    known: dict[tuple, tuple] = {}

    def of(extra):
        if tuple(extra) not in known:
            folder = tmp_path_factory.mktemp("reference")
            known[tuple(extra)] = curve(folder, ONE, recipe, [*EVALUATED, *extra]), heldout(folder)
        return known[tuple(extra)]

    return of


@pytest.mark.parametrize(("layout", "extra"), CASES, ids=str)
def test_fp32_curve_is_the_same(layout, extra, tmp_path, recipe, reference):
    expected, expected_heldout = reference([option for option in extra if not option.startswith("parallel.")])
    assert expected[-1][0] < expected[0][0] - 0.4, "the reference did not learn, so equality would prove little"
    assert any(norm > 1.0 for _, norm in expected), "clipping never acted"
    loss, norm = largest_differences(context_curve(tmp_path, layout, recipe, [*EVALUATED, *extra]), expected)
    assert loss <= 1e-5, f"loss differs by {loss:.1e}, gradient norm by {norm:.1e}"
    assert norm <= 1e-4, f"gradient norm differs by {norm:.1e}, loss by {loss:.1e}"
    assert heldout(tmp_path) == pytest.approx(expected_heldout, rel=1e-5)


@pytest.mark.parametrize("layout", [(2, 2, 1, 1, 1, True), (1, 2, 1, 1, 0, False)], ids=str)
def test_bf16_curve_is_close(layout, tmp_path, recipe, reference):
    bf16 = ["precision.compute=bf16"]
    found = context_curve(tmp_path, layout, recipe, [*bf16, "precision.reduce=compute"])
    assert largest_differences(found, reference(bf16)[0])[0] <= 2e-2


def test_recompute_changes_nothing(tmp_path, recipe):
    layout, short = (1, 2, 1, 1, 0, False), ["run.steps=20", "model.attention_dropout=0.1", "model.dropout=0.1"]
    plain = context_curve(tmp_path / "plain", layout, recipe, short)
    for kind in ("full", "selective"):
        assert context_curve(tmp_path / kind, layout, recipe, [*short, f"parallel.recompute={kind}"]) == plain


def test_a_checkpoint_goes_on_without_context_ranks(tmp_path, recipe, reference):
    """Written by 2 x 2 ranks under ZeRO-3, read by one."""
    keep = [f"run.dir={tmp_path / 'run'}", "schedule.decay_steps=24", "checkpoint.every=12"]
    four = [*keep, "run.steps=12", "parallel.context=2", "parallel.zero_stage=3"]
    assert train_on(4, recipe, four) == [0] * 4
    assert train_on(1, recipe, [*keep, "run.steps=24"]) == [0]
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    found = [(record["loss"], record["grad_norm"]) for record in records]
    loss, norm = largest_differences(found, reference([])[0])
    assert loss <= 1e-5
    assert norm <= 1e-4
    assert records[-1]["tokens"] == 24 * 8 * 32, "tokens count once, not once for each context rank"


def test_a_long_sequence_over_four_ranks(tmp_path, recipe):
    """32,768 tokens, of which no rank holds more than 8,192 outside attention."""
    long = ["model.sequence_length=32768", "model.layers=1", "model.hidden=32", "parallel.micro_batch=1",
            "parallel.global_batch=1", "run.steps=1", "data.heldout=null"]
    found = []
    for ranks in (1, 4):
        folder = tmp_path / str(ranks)
        overrides = [f"run.dir={folder}", f"parallel.context={ranks}", *long]
        assert train_on(ranks, recipe, overrides, timeout_seconds=900) == [0] * ranks
        found += read_metrics(folder / "metrics.jsonl")
    alone, together = found
    assert together["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert together["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-4)
