"""A V-shaped pipeline gives the curve of one rank, like the plain one."""

from __future__ import annotations

import pytest

from pretrain.training.metrics import EVALUATIONS_FILE, read_metrics
from tests.helpers.recipes import recipe_of, write_recipe
from tests.parity.test_layouts import UNTIED, curve, largest_differences

EVALUATED = ["log.evaluate_every=24", "log.evaluate_samples=3"]  # fewer micro-batches than DualPipeV can run


def run(folder, family, dataset, layout, extra=()):
    """Curve and held-out losses of a family on a layout (tensor, pipeline, data, ZeRO stage, sequence)."""
    folder.mkdir()
    recipe = write_recipe(folder / "recipe.yaml", dataset, recipe_of(family))
    found = curve(folder, layout, recipe, [*EVALUATED, "optimizer.lr=2e-3", *extra])
    (path,) = folder.glob(f"*/{EVALUATIONS_FILE}")
    return found, [record["heldout_loss"] for record in read_metrics(path)]


@pytest.mark.parametrize(("family", "layout", "extra"), [
    ("gpt", (1, 2, 1, 0, False), ["model.experts=4", "model.top_k=2", "model.balance_loss=0.05"]),
    ("gpt", (2, 2, 1, 1, True), [*UNTIED, "model.layers=5", "parallel.recompute=full"]),
    ("gpt", (1, 2, 2, 1, False), ["parallel.micro_batch=1", "parallel.loss_chunk_tokens=12"]),
    ("t5", (1, 2, 1, 1, False), []),
], ids=str)  # fmt: skip
def test_fp32_curve_is_the_same(family, layout, extra, tmp_path, dataset):
    plain = [option for option in extra if not option.startswith("parallel.")]
    expected, expected_heldout = run(tmp_path / "one", family, dataset, (1, 1, 1, 0, False), plain)
    assert expected[-1][0] < expected[0][0] - 0.3, "the reference did not learn, so equality would prove little"
    found, found_heldout = run(tmp_path / "folded", family, dataset, layout, ["parallel.schedule=dualpipev", *extra])
    loss, norm = largest_differences(found, expected)
    assert loss <= 1e-5, f"loss differs by {loss:.1e}, gradient norm by {norm:.1e}"
    assert norm <= 1e-4, f"gradient norm differs by {norm:.1e}, loss by {loss:.1e}"
    assert found_heldout == pytest.approx(expected_heldout, rel=1e-5)
