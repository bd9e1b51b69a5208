"""A loss over the whole global batch: no layout and no size of micro-batch may change it or its gradient."""

from __future__ import annotations

import pytest

from tests.helpers.ranks import run_ranks
from tests.helpers.recipes import CLIP

pytestmark = pytest.mark.slow

GLOBAL_BATCH = 16


def one_step(info, values: dict, objective: str) -> tuple[dict, list[float], float]:
    """Gradients by global name (ZeRO 0, one data rank only), the losses of two steps, a loss without gradient."""
    import torch

    from parallel.layout import Layout
    from parallel.process_groups import build_groups
    from parallel.ranks.rendezvous import join
    from pretrain.config.run_config import config_from
    from pretrain.training.build_engine import build_engine

    values = {**values, "objective": {"name": objective}, "optimizer": {"lr": 1e-3, "clip_norm": 0.0}}
    config = config_from(values, "test")
    join(info)
    groups = build_groups(Layout.of(config.parallel, info.world_size))
    engine = build_engine(config, groups, torch.device("cpu"))
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randint(256, (GLOBAL_BATCH, 3, 16, 16), generator=generator, dtype=torch.uint8)
    tokens = torch.randint(512, (GLOBAL_BATCH, 12), generator=generator)
    ends = torch.randint(12, (GLOBAL_BATCH,), generator=generator)
    share = GLOBAL_BATCH // groups.layout.data
    first, micro = groups.coordinates.dp * share, config.parallel.micro_batch
    batches = [{"pixels": pixels[i : i + micro], "tokens": tokens[i : i + micro], "ends": ends[i : i + micro]}
               for i in range(first, first + share, micro)]
    evaluated = engine.evaluate(batches).loss
    gradients = {}
    clip = engine.step_hooks.clip

    def keep():
        for name, _, tensor in engine.state.gradients():
            gradients.setdefault(name, tensor.clone().numpy())
        clip()

    engine.step_hooks.clip = keep
    results = [engine.train_step(batches, step, 1e-3) for step in (1, 2)]
    engine.close()
    return gradients, [(r.loss, r.grad_norm) for r in results], evaluated


def values(micro_batch: int, **parallel) -> dict:
    return {**CLIP, "data": {"train": "unused"},
            "parallel": {"micro_batch": micro_batch, "global_batch": GLOBAL_BATCH, **parallel}}


@pytest.fixture(scope="module", params=["contrastive", "siglip"])
def whole(request):
    """One rank, one micro-batch: the plain gradient."""
    gradients, steps, evaluated = run_ranks(one_step, 1, values(GLOBAL_BATCH), request.param)[0]
    assert evaluated == pytest.approx(steps[0][0], rel=1e-6)
    assert steps[1][0] < steps[0][0]
    return request.param, gradients, steps


def test_micro_batches_keep_the_gradient(whole):
    objective, expected, steps = whole
    found, micro_steps, _ = run_ranks(one_step, 1, values(4), objective)[0]
    assert found.keys() == expected.keys()
    largest = max(abs(gradient).max() for gradient in expected.values())
    for name, gradient in expected.items():
        assert abs(found[name] - gradient).max() <= 1e-5 * max(largest, abs(gradient).max()), name
    assert micro_steps == [pytest.approx(step, rel=1e-5) for step in steps]


LAYOUTS = [
    (2, 8, {}), (2, 4, {}), (4, 2, {}), (2, 4, {"zero_stage": 1}), (2, 4, {"zero_stage": 2}), (2, 4, {"zero_stage": 3}),
    (2, 8, {"zero_stage": 3, "recompute": "full"}), (2, 4, {"tensor": 2}),
    (4, 4, {"tensor": 2, "sequence": True, "zero_stage": 1}),
]
SIGLIP_LAYOUTS = [(2, 4, {}), (4, 2, {}), (2, 4, {"zero_stage": 3})]  # another loss over the same two passes


@pytest.mark.parametrize(("whole", "world_size", "micro_batch", "parallel"), [
    *(("contrastive", *layout) for layout in LAYOUTS), *(("siglip", *layout) for layout in SIGLIP_LAYOUTS),
], ids=str, indirect=["whole"])  # fmt: skip
def test_layouts_agree(whole, world_size, micro_batch, parallel):
    objective, _, steps = whole
    for _, found, evaluated in run_ranks(one_step, world_size, values(micro_batch, **parallel), objective):
        assert evaluated == pytest.approx(steps[0][0], rel=1e-5)
        for (loss, norm), (expected_loss, expected_norm) in zip(found, steps, strict=True):
            assert loss == pytest.approx(expected_loss, rel=1e-5)
            assert norm == pytest.approx(expected_norm, rel=1e-4)
