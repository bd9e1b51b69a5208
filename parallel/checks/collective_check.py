"""Every collective on every axis against its known answer, and how fast it is.

Numbers are small integers in fp32, so sums are exact and the answer is one tensor. All groups of an axis work at the
same time, as they do in a step. Speeds are bus bandwidths as nccl-tests defines them (its doc/PERFORMANCE.md): the
bytes that have to pass a rank's link for the operation, divided by the time, so axes of different size compare.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.process_groups import Groups

PERIOD = 7  # the values count up to this and begin again, so a shifted or repeated part shows
ROUNDS = 3


@dataclass(frozen=True)
class Member:
    """This rank in one group: `ranks` are the group's, `index` is its own place among them."""

    axis: str
    group: dist.ProcessGroup
    ranks: tuple[int, ...]
    index: int

    @property
    def size(self) -> int:
        return len(self.ranks)


class CollectiveCase(NamedTuple):
    """One collective, ready to run: `result` holds what arrives and `answer` what must arrive the first time.

    `link_share`: which part of the whole buffer's bytes passes a rank's link.
    """

    run: Callable[[], None]
    result: Tensor
    answer: Tensor
    link_share: float


class Measured(NamedTuple):
    """What one rank saw of one collective on one axis. `seconds` is that of the fastest of a few rounds."""

    axis: str
    operation: str
    ranks: tuple[int, ...]
    right: bool
    num_bytes: int
    link_bytes_per_second: float


def memberships(groups: Groups) -> list[Member]:
    """The groups of this rank with more than one member, and the world where it is none of them."""
    named = {**{field.name: getattr(groups, field.name) for field in fields(groups)}, "world": dist.group.WORLD}
    found = {axis: group for axis, group in named.items() if isinstance(group, dist.ProcessGroup)}
    members: dict[tuple[int, ...], Member] = {}
    for axis, group in found.items():
        ranks = tuple(dist.get_process_group_ranks(group))
        if len(ranks) > 1:
            members.setdefault(ranks, Member(axis, group, ranks, ranks.index(dist.get_rank())))
    return list(members.values())


def _counting(size: int, device: torch.device) -> Tensor:
    return (torch.arange(size, device=device) % PERIOD).float()


def _all_reduce(member: Member, size: int, device: torch.device) -> CollectiveCase:
    n, base = member.size, _counting(size, device)
    result = base + member.index
    return CollectiveCase(lambda: dist.all_reduce(result, group=member.group), result, n * base + n * (n - 1) / 2,
                    2 * (n - 1) / n)


def _all_gather(member: Member, size: int, device: torch.device) -> CollectiveCase:
    n, base = member.size, _counting(size // member.size, device)
    result = torch.empty(n, len(base), device=device)
    return CollectiveCase(lambda: dist.all_gather(list(result.unbind()), base + member.index, group=member.group),
                          result, torch.stack([base + index for index in range(n)]), (n - 1) / n)


def _reduce_scatter(member: Member, size: int, device: torch.device) -> CollectiveCase:
    n, base = member.size, _counting(size // member.size * member.size, device).view(member.size, -1)
    parts, result = list((base + member.index).unbind()), torch.empty(base.shape[1], device=device)
    return CollectiveCase(lambda: dist.reduce_scatter(result, parts, group=member.group), result,
                    n * base[member.index] + n * (n - 1) / 2, (n - 1) / n)


def _all_to_all(member: Member, size: int, device: torch.device) -> CollectiveCase:
    n, base = member.size, _counting(size // member.size, device)
    others = torch.arange(n, device=device).unsqueeze(1)
    result = torch.empty(n, len(base), device=device)
    sent = base + n * member.index + others  # one row for each member, which tells sender and receiver
    return CollectiveCase(lambda: dist.all_to_all_single(result, sent, group=member.group), result,
                    base + n * others + member.index, (n - 1) / n)


def _broadcast(member: Member, size: int, device: torch.device) -> CollectiveCase:
    last, base = member.size - 1, _counting(size, device)
    result = base + member.index
    return CollectiveCase(lambda: dist.broadcast(result, src=member.ranks[last], group=member.group), result,
                          base + last, 1.0)


def _send_recv(member: Member, size: int, device: torch.device) -> CollectiveCase:
    base = _counting(size, device)
    following, before = (member.ranks[(member.index + step) % member.size] for step in (1, -1))
    sent, result = base + member.index, torch.empty_like(base)

    def run() -> None:  # a ring: to the next rank of the group, from the one before
        pair = [dist.P2POp(dist.isend, sent, following, member.group),
                dist.P2POp(dist.irecv, result, before, member.group)]
        for request in dist.batch_isend_irecv(pair):
            request.wait()

    return CollectiveCase(run, result, base + (member.index - 1) % member.size, 1.0)


OPERATIONS: dict[str, Callable[[Member, int, torch.device], CollectiveCase]] = {
    "all_reduce": _all_reduce, "all_gather": _all_gather, "reduce_scatter": _reduce_scatter,
    "all_to_all": _all_to_all, "broadcast": _broadcast, "send_recv": _send_recv,
}  # fmt: skip


def measure(groups: Groups, device: torch.device, num_bytes: int, begin: Callable[[str], None]) -> Iterator[Measured]:
    """Runs every collective on every axis, the same order on all ranks.

    Args:
        num_bytes: size of the whole buffer of an operation, fp32 numbers.
        begin: called with the words for what comes next, so that a rank that hangs can be found.
    """
    for member in memberships(groups):
        for name, prepare in OPERATIONS.items():
            begin(f"{name} over {member.axis}")
            exchange = prepare(member, max(member.size, num_bytes // 4), device)
            exchange.run()
            right = torch.equal(exchange.result, exchange.answer)
            seconds = min(_seconds(exchange.run, device) for _ in range(ROUNDS))
            yield Measured(member.axis, name, member.ranks, right, num_bytes,
                           exchange.link_share * num_bytes / seconds)


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
