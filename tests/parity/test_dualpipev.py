"""A V-shaped pipeline gives the curve of one rank, like the plain one."""

from __future__ import annotations

import pytest

from tests.helpers.runs import EVALUATED, SHORT, Case, check_reference, check_same
from tests.parity.test_layouts import UNTIED

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("family", "case", "extra"), [
    ("gpt", Case(pipeline=2), ["model.experts=4", "model.top_k=2", "model.balance_loss=0.05"]),
    ("gpt", Case(tensor=2, pipeline=2, zero=1, sequence=True),
     [*UNTIED, "model.layers=5", "parallel.recompute=full"]),
    ("gpt", Case(pipeline=2, data=2, zero=1), ["parallel.micro_batch=1", "parallel.loss_chunk_tokens=12"]),
    ("t5", Case(pipeline=2, zero=1), []),
], ids=str)  # fmt: skip
def test_fp32_curve_is_the_same(family, case, extra, runs):
    options = [*SHORT, *EVALUATED, *extra]
    expected = runs.reference(family, options)
    check_reference(expected, learnt=0.1)
    assert len(expected.heldout) == 2
    check_same(runs.on(case, family, ["parallel.schedule=dualpipev", *options]), expected)
