"""Every family gives the same curve on every layout, in fp32: losses within 1e-5, gradient norms within 1e-4."""

from __future__ import annotations

import pytest

from pretrain.models import FAMILIES
from pretrain.training.metrics import EVALUATIONS_FILE, METRICS_FILE, read_metrics
from tests.helpers.ranks import train_on
from tests.helpers.recipes import recipe_of, write_recipe

TEXT_FAMILIES = [family for family in FAMILIES if family != "clip"]  # test_clip.py has its pictures
ONE = (1, 1, 1, 0, False)
LAYOUTS = [(2, 1, 2, 1, True), (1, 1, 2, 3, False), (2, 2, 1, 1, False)]  # tensor, pipeline, data, ZeRO stage, sequence
V1_1 = ["model.activation=geglu_tanh", "model.tied_head=false"]
ROOM = "model.vocab_size=544"
VARIANTS = [  # family, overrides, layout
    ("t5", [*V1_1, "objective.name=prefix_lm", "model.target_length=32"], (2, 2, 1, 1, True)),
    ("t5", ["parallel.recompute=full"], (1, 4, 1, 1, False)),
    ("t5", ["parallel.recompute=selective"], (1, 2, 2, 0, False)),
    ("t5", ["parallel.loss_chunk_tokens=10"], (1, 1, 2, 3, False)),
    ("bert", ["parallel.loss_chunk_tokens=5", "parallel.recompute=selective"], (2, 2, 1, 1, True)),
    ("bart", ["objective.mask_ratio=0.1", "objective.delete_ratio=0.1", "objective.rotate_rate=0.5"],
     (2, 2, 1, 0, True)),
    ("bert", ["model.next_sentence=false", "model.segment_types=1", "model.position_offset=2",
              "objective.whole_words=true"], (2, 2, 1, 1, True)),
    ("gpt", [ROOM, "objective.name=prefix_lm", "model.norm_position=post"], (2, 2, 1, 1, True)),
    ("gpt", [ROOM, "objective.name=prefix_lm"], (1, 1, 2, 3, False)),
    ("gpt", [ROOM, "objective.name=fill_in_the_middle"], (1, 2, 2, 1, False)),
]
ALL_THE_TIME = ["run.steps=20", "optimizer.lr=2e-3", "log.evaluate_every=20", "log.evaluate_samples=5"]


@pytest.fixture(scope="module")
def run(dataset, tmp_path_factory):
    """The records of a family's run on a layout by (overrides), each made once."""
    known: dict[tuple, list[dict]] = {}

    def records(family: str, layout: tuple, extra: tuple[str, ...] = ()) -> list[dict]:
        if (family, layout, extra) not in known:
            folder = tmp_path_factory.mktemp(family)
            tensor, pipeline, data, stage, sequence = layout
            recipe = write_recipe(folder / "recipe.yaml", dataset, recipe_of(family))
            overrides = [f"run.dir={folder / 'run'}", f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}",
                         f"parallel.zero_stage={stage}", f"parallel.sequence={str(sequence).lower()}", *ALL_THE_TIME]
            codes = train_on(tensor * pipeline * data, recipe, [*overrides, *extra])
            assert codes == [0] * len(codes)
            known[family, layout, extra] = [record for name in (METRICS_FILE, EVALUATIONS_FILE)
                                            for record in read_metrics(folder / "run" / name)]
        return known[family, layout, extra]

    return records


def check(found: list[dict], expected: list[dict], bound: float = 1e-5) -> None:
    losses = [[r["loss"] for r in records if "loss" in r] for records in (found, expected)]
    norms = [[r["grad_norm"] for r in records if "loss" in r] for records in (found, expected)]
    heldout = [[r["heldout_loss"] for r in records if "heldout_loss" in r] for records in (found, expected)]
    assert len(losses[1]) == 20 and len(heldout[1]) == 2
    assert losses[1][-1] < losses[1][0] - 0.3, "the reference did not learn, so equality would prove little"
    assert losses[0] == pytest.approx(losses[1], rel=bound)
    assert norms[0] == pytest.approx(norms[1], rel=10 * bound)
    assert heldout[0] == pytest.approx(heldout[1], rel=bound)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda c: "tp{}-pp{}-dp{}-zero{}-sp{:d}".format(*c))
@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_fp32_curve_is_the_same(family, layout, run):
    check(run(family, layout), run(family, ONE))


@pytest.mark.parametrize(("family", "extra", "layout"), VARIANTS, ids=str)
def test_variants(family, extra, layout, run):
    plain = tuple(option for option in extra if not option.startswith("parallel."))
    check(run(family, layout, tuple(extra)), run(family, ONE, plain))


@pytest.mark.parametrize("family", [family for family in TEXT_FAMILIES if family != "gpt"])  # test_layouts.py has GPT
def test_bf16_with_recompute_is_close(family, run):
    extra = ("precision.compute=bf16", "parallel.recompute=full")
    check(run(family, (2, 2, 1, 1, True), extra), run(family, ONE), bound=2e-2)
