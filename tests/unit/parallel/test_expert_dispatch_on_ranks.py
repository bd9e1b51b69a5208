"""Dispatch to experts on other ranks, their products and combine, against the loop over all experts on one rank."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from parallel.expert_parallel import Dispatch, ExpertParallel
from parallel.layout import Layout
from parallel.process_groups import build_groups
from parallel.ranks.rendezvous import join
from parallel.tensor_parallel import TensorParallel
from tests.helpers.ranks import run_ranks

EXPERTS, TOKENS, CHOICES, SIZE_IN, SIZE_OUT = 4, 7, 2, 3, 5
UNUSED = 2  # no token of any rank chooses it


def tokens_of(rank: int, drops: bool):
    """(tokens, chosen experts, what is kept, gradient of the output) of a rank; every rank can draw those of all."""
    generator = torch.Generator().manual_seed(100 + rank)
    x = torch.randn(TOKENS, SIZE_IN, generator=generator)
    usable = torch.tensor([expert for expert in range(EXPERTS) if expert != UNUSED])
    chosen = torch.stack([usable[torch.randperm(len(usable), generator=generator)[:CHOICES]] for _ in range(TOKENS)])
    kept = torch.rand(TOKENS, CHOICES, generator=generator) > 0.3 if drops else None
    return x, chosen, kept, torch.randn(CHOICES, TOKENS, SIZE_OUT, generator=generator)


def dense(x, chosen, kept, weight, bias):
    """[k, T, out]: each choice's product, zeros where it was dropped."""
    rows = torch.stack([F.linear(x[token], weight[expert], bias[expert])
                        for choice in range(CHOICES) for token, expert in enumerate(chosen[:, choice].tolist())])
    rows = rows.view(CHOICES, TOKENS, SIZE_OUT)
    return rows if kept is None else rows * kept.t()[..., None]


def exchange(info, drops: bool) -> list[str]:
    join(info)
    tp = TensorParallel(build_groups(Layout(data=info.world_size, expert=info.world_size)), torch.device("cpu"))
    experts = ExpertParallel(EXPERTS, tp)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(EXPERTS, SIZE_OUT, SIZE_IN, generator=generator).requires_grad_()
    bias = torch.randn(EXPERTS, SIZE_OUT, generator=generator).requires_grad_()
    expected = {}
    for rank in range(info.world_size):  # an expert's gradient is the sum over the tokens of all ranks
        x, chosen, kept, cotangent = tokens_of(rank, drops)
        x.requires_grad_()
        output = dense(x, chosen, kept, weight, bias)
        (output * cotangent).sum().backward()
        if rank == info.rank:
            expected |= {"output": output, "token gradient": x.grad}
    here = slice(experts.here.start, experts.here.stop)
    expected |= {"weight gradient": weight.grad[here], "bias gradient": bias.grad[here]}

    layer = experts.column(SIZE_IN, SIZE_OUT, bias=True, std=1.0)
    with torch.no_grad():
        layer.weight.copy_(weight[here])
        layer.bias.copy_(bias[here])
    x, chosen, kept, cotangent = tokens_of(info.rank, drops)
    x.requires_grad_()
    dispatch = Dispatch(chosen, kept, experts)
    output = dispatch.combine(layer(dispatch.dispatch(x), dispatch.counts))
    (output * cotangent).sum().backward()
    found = {"output": output, "token gradient": x.grad, "weight gradient": layer.weight.grad,
             "bias gradient": layer.bias.grad}
    return [name for name, tensor in found.items() if not torch.allclose(tensor, expected[name], rtol=1e-5, atol=1e-6)]


@pytest.mark.parametrize("drops", [False, True], ids=["all kept", "some dropped"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_compute_what_one_does(ranks, drops):
    assert run_ranks(exchange, ranks, drops) == [[]] * ranks
