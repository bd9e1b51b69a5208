"""Every family gives the same curve on every layout, in fp32: losses within 1e-5, gradient norms within 1e-4."""

from __future__ import annotations

import pytest

from pretrain.models import FAMILIES
from tests.helpers.runs import EVALUATED, SHORT, Case, check_reference, check_same

pytestmark = pytest.mark.slow

TEXT_FAMILIES = [family for family in FAMILIES if family != "clip"]  # test_clip.py has its pictures
LAYOUTS = [Case(tensor=2, data=2, zero=1, sequence=True), Case(data=2, zero=3), Case(tensor=2, pipeline=2, zero=1)]
PIPED = Case(tensor=2, pipeline=2, zero=1, sequence=True)
V1_1 = ["model.activation=geglu_tanh", "model.tied_head=false"]
ROOM = "model.vocab_size=544"
VARIANTS = [  # family, overrides, layout
    ("t5", [*V1_1, "objective.name=prefix_lm", "model.target_length=32"], PIPED),
    ("t5", ["parallel.recompute=full"], Case(pipeline=4, zero=1)),
    ("t5", ["parallel.recompute=selective"], Case(pipeline=2, data=2)),
    ("t5", ["parallel.loss_chunk_tokens=10"], Case(data=2, zero=3)),
    ("bert", ["parallel.loss_chunk_tokens=5", "parallel.recompute=selective"], PIPED),
    ("bart", ["objective.mask_ratio=0.1", "objective.delete_ratio=0.1", "objective.rotate_rate=0.5"],
     Case(tensor=2, pipeline=2, sequence=True)),
    ("bert", ["model.next_sentence=false", "model.segment_types=1", "model.position_offset=2",
              "objective.whole_words=true"], PIPED),
    ("gpt", [ROOM, "objective.name=prefix_lm", "model.norm_position=post"], PIPED),
    ("gpt", [ROOM, "objective.name=prefix_lm"], Case(data=2, zero=3)),
    ("gpt", [ROOM, "objective.name=fill_in_the_middle"], Case(pipeline=2, data=2, zero=1)),
]
OPTIONS = (*SHORT, *EVALUATED)
RATES = {"bert": ["optimizer.lr=4e-3"]}  # a batch has few masked tokens, so six steps at the usual rate hardly show


def check(runs, family: str, case: Case, extra: list[str], bound: float = 1e-5) -> None:
    extra = [*RATES.get(family, []), *extra]
    expected = runs.reference(family, [*OPTIONS, *(option for option in extra if not option.startswith("precision."))])
    check_reference(expected, learnt=0.1)
    assert len(expected.heldout) == 2
    check_same(runs.on(case, family, [*OPTIONS, *extra]), expected, bound)


@pytest.mark.parametrize("case", LAYOUTS, ids=str)
@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_fp32_curve_is_the_same(family, case, runs):
    check(runs, family, case, [])


@pytest.mark.parametrize(("family", "extra", "case"), VARIANTS, ids=str)
def test_variants(family, extra, case, runs):
    check(runs, family, case, extra)


@pytest.mark.parametrize("family", [family for family in TEXT_FAMILIES if family != "gpt"])  # test_layouts.py has GPT
def test_bf16_with_recompute_is_close(family, runs):
    expected = runs.reference(family, OPTIONS)
    found = runs.on(PIPED, family, [*OPTIONS, "precision.compute=bf16", "parallel.recompute=full"])
    check_same(found, expected, bound=2e-2)
