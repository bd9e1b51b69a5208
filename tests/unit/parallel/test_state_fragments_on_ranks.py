"""The fragments of weights and Adam's moments that ranks own, put together, are those of one rank, each element once.

After one step the first moment is a tenth of the gradient: what ZeRO, the pipeline or the tensor axis does to a
gradient shows here by the name of the parameter.
"""

from __future__ import annotations

from math import prod

import pytest
import torch

from parallel.layout import Layout
from parallel.process_groups import build_groups
from parallel.ranks.rendezvous import join
from pretrain.config.run_config import config_from
from pretrain.training.build_engine import build_engine
from tests.helpers.marks import slow_after
from tests.helpers.ranks import run_ranks
from tests.helpers.recipes import GPT

GLOBAL_BATCH = 8


def values(micro_batch: int, **parallel) -> dict:
    return {**GPT, "data": {"train": "unused"}, "optimizer": {"lr": 1e-3, "clip_norm": 0.0},
            "model": {**GPT["model"], "layers": 2, "hidden": 16, "sequence_length": 8, "vocab_size": 64},
            "parallel": {"micro_batch": micro_batch, "global_batch": GLOBAL_BATCH, **parallel}}


def owned(info, values: dict) -> list[list[tuple]]:
    """The fragments this rank owns, of the initial state and after one step, with numbers as lists."""
    config = config_from(values, "test")
    join(info)
    groups = build_groups(Layout.of(config.parallel, info.world_size))
    engine = build_engine(config, groups, torch.device("cpu"))
    tokens = torch.randint(64, (GLOBAL_BATCH, 9), generator=torch.Generator().manual_seed(1))
    share = GLOBAL_BATCH // groups.layout.data
    own = tokens[groups.coordinates.dp * share :][:share]
    batches = [{"tokens": part} for part in own.split(config.parallel.micro_batch)]
    found = []
    for step in range(2):
        if step:
            engine.train_step(batches if engine.needs_data else None, step, 1e-3)
        owned_here = [(part.range, part.tensor.detach().float().numpy().copy()) for part in engine.owned_fragments()]
        found.append([(at.name, at.kind, at.shape, at.slice_dim, at.slice_rank, at.slice_size, at.start, numbers)
                      for at, numbers in owned_here])
    engine.close()
    return found


def put_together(by_rank: list[list[tuple]]) -> dict[tuple[str, str], torch.Tensor]:
    """Whole tensors by (name, kind). Raises AssertionError where an element has no owner, or two."""
    wholes, owners = {}, {}
    for name, kind, shape, dim, slice_rank, slice_size, start, numbers in (part for parts in by_rank for part in parts):
        whole = wholes.setdefault((name, kind), torch.full(shape, float("nan")))
        count = owners.setdefault((name, kind), torch.zeros(shape))
        local = [size // slice_size if at == dim else size for at, size in enumerate(shape)]
        for target, content in ((whole, torch.from_numpy(numbers)), (count, torch.ones(len(numbers)))):
            view = target if dim is None else target.narrow(dim, slice_rank * local[dim], local[dim])
            flat = view.reshape(-1).clone()
            piece = flat[start : start + len(numbers)]
            flat[start : start + len(numbers)] = piece + content if target is count else content
            view.copy_(flat.view(local))
        assert start + len(numbers) <= prod(local), name
    wrong = [f"{name} ({kind}): owned {count.min():.0f} to {count.max():.0f} times"
             for (name, kind), count in owners.items() if (count != 1).any()]
    assert wrong == []
    return wholes


@pytest.fixture(scope="module")
def one_rank():
    (parts,) = run_ranks(owned, 1, values(GLOBAL_BATCH))
    return [put_together([part]) for part in parts]


@pytest.mark.parametrize(("ranks", "parallel"), slow_after(2, [
    (2, {"zero_stage": 1}), (2, {"zero_stage": 3}), (2, {"zero_stage": 0}), (2, {"zero_stage": 2}),
    (2, {"tensor": 2}), (2, {"pipeline": 2, "zero_stage": 1}),
    (2, {"zero_stage": 2, "offload": "optimizer"}), (4, {"tensor": 2, "sequence": True, "zero_stage": 3}),
]), ids=str)  # fmt: skip
def test_fragments_of_all_ranks_are_the_state_of_one(ranks, parallel, one_rank):
    by_rank = run_ranks(owned, ranks, values(2, **parallel))
    for step, expected in enumerate(one_rank):
        found = put_together([parts[step] for parts in by_rank])
        assert found.keys() == expected.keys()
        for (name, kind), tensor in found.items():
            if step == 0:
                assert torch.equal(tensor, expected[name, kind]), f"{name} ({kind}) starts differently"
            elif kind != "weight":  # where a gradient is nearly nothing, Adam makes a whole step of its sign
                scale = expected[name, kind].abs().max()
                assert (tensor - expected[name, kind]).abs().max() <= 1e-5 * scale, f"{name} ({kind}) after one step"
