"""The all-to-all of context parallelism on two and four ranks, against the whole sequence on one."""

from __future__ import annotations

import pytest
import torch

from parallel.context_parallel import ContextParallel
from parallel.layout import Layout
from parallel.process_groups import build_groups
from parallel.ranks.rendezvous import join
from tests.helpers.ranks import run_ranks

LENGTH, BATCH, HEADS, HEAD_DIM = 8, 3, 4, 5


def exchange(info) -> list[str]:
    """What differs on this rank when heads mix along the sequence, as attention does, between the two all-to-alls."""
    join(info)
    groups = build_groups(Layout(context=info.world_size))
    context = ContextParallel(groups.context, groups.layout.context, groups.coordinates.cp)
    generator = torch.Generator().manual_seed(1)
    whole = torch.randn(LENGTH, BATCH, HEADS * HEAD_DIM, generator=generator).requires_grad_()
    cotangent = torch.randn(whole.shape, generator=generator)
    mixed = whole.square().cumsum(0)
    (mixed * cotangent).sum().backward()

    part = context.part(whole.detach(), dim=0).clone().requires_grad_()
    heads = context.to_heads(part)
    found = context.to_sequence(heads.square().cumsum(0))
    (found * context.part(cotangent, dim=0)).sum().backward()
    first, count = HEADS // info.world_size * info.rank, HEADS // info.world_size
    own_heads = whole.detach().unflatten(-1, (HEADS, HEAD_DIM))[:, :, first : first + count].flatten(2)
    pairs = {
        "to_heads": (heads, own_heads), "to_sequence": (found, context.part(mixed, dim=0)),
        "backward": (part.grad, context.part(whole.grad, dim=0)),
        "overlap": (context.part(torch.arange(LENGTH + 1), dim=0, overlap=1),
                    torch.arange(LENGTH + 1)[context.first(len(part)) :][: len(part) + 1]),
    }  # fmt: skip
    return [name for name, (a, b) in pairs.items() if a.shape != b.shape or not torch.allclose(a, b, rtol=1e-5)]


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_compute_what_one_does(ranks):
    assert run_ranks(exchange, ranks) == [[]] * ranks
