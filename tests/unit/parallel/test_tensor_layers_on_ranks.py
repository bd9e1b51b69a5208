"""Layers and regions of the tensor axis on two ranks, each against its definition on one, forward and backward.

Every rank knows the whole tensors, since they are drawn from fixed seeds; it compares its slice or part of them.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.layout import Layout
from parallel.process_groups import build_groups
from parallel.ranks.rendezvous import join
from parallel.tensor_parallel import TensorParallel
from tests.helpers.ranks import run_ranks

RANKS, LENGTH, BATCH, WIDE, NARROW = 2, 6, 3, 8, 4


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def slice_of(whole: Tensor, dim: int | None, rank: int, size: int) -> Tensor:
    """Part `rank` of `size` equal ones along a dim; None for the whole."""
    return whole if dim is None else whole.chunk(size, dim)[rank]


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


def tensor_axis(info, sequence: bool) -> TensorParallel:
    join(info)
    return TensorParallel(build_groups(Layout(tensor=info.world_size, sequence=sequence)), torch.device("cpu"))


def mine(tp: TensorParallel, whole: Tensor) -> Tensor:
    """The rows of a sequence [s, ..] that this rank has between the layers."""
    return slice_of(whole, 0 if tp.sequence else None, tp.rank, tp.size)


def compare(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Names of what differs from its definition."""
    assert found.keys() == expected.keys()
    return [name for name, tensor in found.items()
            if tensor.shape != expected[name].shape or not torch.allclose(tensor, expected[name], rtol=1e-5, atol=1e-6)]


def column_and_row(info, sequence: bool) -> list[str]:
    """y = x W1' + b1, z = gelu(y) W2' + b2, the feed-forward part of a block."""
    tp = tensor_axis(info, sequence)
    x, cotangent = leaf(drawn(1, LENGTH, BATCH, NARROW)), drawn(2, LENGTH, BATCH, NARROW)
    whole = {"w1": leaf(drawn(3, WIDE, NARROW)), "b1": leaf(drawn(4, WIDE)),
             "w2": leaf(drawn(5, NARROW, WIDE)), "b2": leaf(drawn(6, NARROW))}  # fmt: skip
    hidden = F.linear(x, whole["w1"], whole["b1"])
    z = F.linear(F.gelu(hidden), whole["w2"], whole["b2"])
    (z * cotangent).sum().backward()

    up, down = tp.column(NARROW, WIDE, bias=True, std=1.0), tp.row(WIDE, NARROW, bias=True, std=1.0)
    slices = {"w1": (up.weight, 0), "b1": (up.bias, 0), "w2": (down.weight, 1), "b2": (down.bias, None)}
    with torch.no_grad():
        for name, (parameter, dim) in slices.items():
            parameter.copy_(slice_of(whole[name], dim, tp.rank, tp.size))
    part = leaf(mine(tp, x))
    found_hidden = up(part)
    found = down(F.gelu(found_hidden))
    (found * mine(tp, cotangent)).sum().backward()
    return compare(
        {"hidden": found_hidden, "output": found, "input gradient": part.grad,
         **{name: parameter.grad for name, (parameter, _) in slices.items()}},
        {"hidden": slice_of(hidden, 2, tp.rank, tp.size), "output": mine(tp, z), "input gradient": mine(tp, x.grad),
         **{name: slice_of(whole[name].grad, dim, tp.rank, tp.size) for name, (_, dim) in slices.items()}})


def vocabulary(info, sequence: bool) -> list[str]:
    """A table's rows and, over logits, the loss of each target."""
    tp = tensor_axis(info, sequence)
    size = 10
    ids = torch.randint(size, (BATCH, LENGTH), generator=torch.Generator().manual_seed(7))
    table, logits = leaf(drawn(8, size, NARROW)), leaf(4 * drawn(9, LENGTH, BATCH, size))
    cotangent, weights = drawn(10, BATCH, LENGTH, NARROW), drawn(11, LENGTH, BATCH)
    rows = F.embedding(ids, table)
    (rows * cotangent).sum().backward()
    losses = F.cross_entropy(logits.flatten(0, 1), ids.t().flatten(), reduction="none").view(LENGTH, BATCH)
    (losses * weights).sum().backward()

    layer = tp.vocabulary(size, NARROW, std=1.0)
    with torch.no_grad():
        layer.weight.copy_(slice_of(table, 0, tp.rank, tp.size))
    found_rows = layer(ids)
    (found_rows * cotangent).sum().backward()
    part = leaf(slice_of(logits, 2, tp.rank, tp.size))
    found_losses = tp.cross_entropy(part, ids.t().contiguous())
    (found_losses * weights).sum().backward()
    return compare(
        {"rows": found_rows, "table": layer.weight.grad, "losses": found_losses, "logits": part.grad},
        {"rows": rows, "table": slice_of(table.grad, 0, tp.rank, tp.size), "losses": losses,
         "logits": slice_of(logits.grad, 2, tp.rank, tp.size)})


def regions(info, sequence: bool) -> list[str]:
    """What each region does with an activation, and with gradients that differ from rank to rank."""
    tp = tensor_axis(info, sequence)
    whole = drawn(20, LENGTH, BATCH, NARROW)
    by_rank = [drawn(30 + rank, LENGTH, BATCH, NARROW) for rank in range(tp.size)]  # cotangents, or partial sums
    total, own = sum(by_rank), by_rank[tp.rank]
    found, expected = {}, {}

    def note(name: str, region, x: Tensor, cotangent: Tensor, *definition: Tensor) -> None:
        x = leaf(x)
        y = region(x)
        (y * cotangent).sum().backward()
        found.update({name: y, f"{name} backward": x.grad})
        expected.update({name: definition[0], f"{name} backward": definition[1]})

    part = mine(tp, whole)
    # scatter: what all ranks compute alike -> the part of each. Backward: the gradients of all parts, or its own whole
    note("scatter_sequence", tp.scatter_sequence, whole, mine(tp, total), mine(tp, whole), total)
    # gather for what every rank computes alike. Backward: this rank's part of its own gradient
    note("gather_sequence", tp.gather_sequence, part, total, whole, mine(tp, total))
    # gather before a product sliced by columns: each rank has a part of the gradient of all rows
    note("gather_for_columns", tp.gather_for_columns, part, own, whole, mine(tp, total))
    note("copy_to_ranks", tp.copy_to_ranks, whole, own, whole, total)
    # behind a product sliced by rows: each rank has a partial sum. Backward: the gradient of all rows
    note("reduce_from_ranks", tp.reduce_from_ranks, own, mine(tp, whole), mine(tp, total), whole)
    note("shared", tp.shared, whole, own, whole, total if sequence else own)
    found["gather_columns"], expected["gather_columns"] = tp.gather_columns(own), torch.cat(by_rank, dim=-1)
    found["full_length"], expected["full_length"] = torch.tensor(tp.full_length(part)), torch.tensor(LENGTH)
    return compare(found, expected)


@pytest.mark.parametrize("sequence", [False, True], ids=["plain", "sequence"])
@pytest.mark.parametrize("mechanism", [column_and_row, vocabulary, regions])
def test_two_ranks_compute_what_one_does(mechanism, sequence):
    assert run_ranks(mechanism, RANKS, sequence) == [[]] * RANKS
