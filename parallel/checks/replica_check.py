"""Whether ranks that must hold the same weights do, bit for bit.

A weight is held more than once along the tensor axis (what is not sliced), along the context and data axes (at ZeRO 0
to 2 the weights that the model computes with; at ZeRO 3 the small ones that stay whole) and on two stages (a tied
table). Each rank takes a fingerprint of every weight it holds, all fingerprints meet on every rank, and those of one
name and place must agree. So every rank comes to the same finding, whatever its layout, with one collective.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.ranks.agreement import all_gather_text, max_over_ranks

if TYPE_CHECKING:
    from parallel.engine import Engine

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes of an element: its bits as a number
CHUNK = 1 << 22  # elements taken at a time, since each is widened to eight bytes
FACTOR = 1_000_003
MAX_NAMED = 8


class Difference(NamedTuple):
    """A weight of which `holders` (ranks, ascending) hold different bits. `odd` are those outside the majority, empty
    where there is none."""

    name: str
    holders: tuple[int, ...]
    odd: tuple[int, ...]


@torch.no_grad()
def fingerprint(tensor: Tensor) -> Tensor:
    """int64 [2] over the bits of `tensor`: their sum as integers, and their sum weighted by place.

    Both are mixed from chunk to chunk with an odd factor, modulo 2^64, so that any single changed element changes them.
    """
    bits = tensor.reshape(-1).view(INTEGERS[tensor.element_size()])
    words = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    places = torch.arange(1, min(CHUNK, bits.numel()) + 1, device=tensor.device)
    for part in bits.split(CHUNK):
        whole = part.long()
        words = words * FACTOR + torch.stack([whole.sum(), (whole * places[: len(whole)]).sum()])
    return words


def differences(engine: Engine) -> list[Difference]:
    """Every weight whose holders disagree, the same list on every rank. A collective of all ranks."""
    held = dict(_held(engine))
    keys = {_number(identity): identity for identity in held}
    rows = torch.zeros(0, 3, dtype=torch.int64)
    if held:
        words = torch.stack([fingerprint(tensor) for tensor in held.values()]).cpu()
        rows = torch.cat([torch.tensor(list(keys)).unsqueeze(1), words], dim=1)
    findings = _disagreements(_gather_rows(rows))
    names = _names([keys.get(number) for number, _, _ in findings[:MAX_NAMED]]) if findings else []
    names += [""] * (len(findings) - len(names))
    return [Difference(name, holders, odd) for name, (_, holders, odd) in zip(names, findings, strict=True)]


def _held(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    """(identity, tensor) of every weight of this rank; ranks that have an identity in common must agree on it."""
    tensor_rank = engine.groups.coordinates.tp
    for held in engine.state.weights():
        slice_rank = None if engine.slots[held.name].slice_dim is None else tensor_rank
        if held.tensor.numel():
            yield json.dumps([held.name, slice_rank, held.replica]), held.tensor


def _number(identity: str) -> int:
    """A positive 63-bit number for an identity."""
    return 1 + (int.from_bytes(hashlib.sha256(identity.encode()).digest()[:8], "big") >> 2)


def _gather_rows(rows: Tensor) -> list[list[list[int]]]:
    """By rank, its rows of (number, word, word). Stages hold different numbers of weights, so short ones are padded."""
    padded = torch.zeros(max_over_ranks(len(rows)), 3, dtype=torch.int64)
    padded[: len(rows)] = rows
    world_size = dist.get_world_size()
    gathered = [torch.empty_like(padded) for _ in range(world_size)]
    dist.all_gather(gathered, padded)  # all ranks: replicas lie along every axis; on the CPU, so gloo carries it
    return [[row for row in part.tolist() if row[0]] for part in gathered]


def _disagreements(by_rank: Sequence[Sequence[Sequence[int]]]) -> list[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    """(number, holders, ranks outside the majority) of what is held with different words."""
    holders: dict[int, dict[tuple[int, ...], list[int]]] = {}
    for rank, rows in enumerate(by_rank):
        for number, *words in rows:
            holders.setdefault(number, {}).setdefault(tuple(words), []).append(rank)
    return [(number, tuple(sorted(rank for ranks in versions.values() for rank in ranks)),
             _outside(list(versions.values())))
            for number, versions in holders.items() if len(versions) > 1]


def _outside(versions: Sequence[list[int]]) -> tuple[int, ...]:
    """Ranks that do not hold the version most ranks hold; none where two versions have as many."""
    largest, second = sorted(versions, key=len, reverse=True)[:2]
    if len(largest) == len(second):
        return ()
    return tuple(sorted(rank for ranks in versions if ranks is not largest for rank in ranks))


def _names(identities: Sequence[str | None]) -> list[str]:
    """The names behind identities that this rank may not hold itself: all ranks tell what they know."""
    own = ["" if identity is None else json.loads(identity)[0] for identity in identities]
    told = [json.loads(text) for text in all_gather_text(json.dumps(own))]  # all ranks: any of them may know a name
    return [next(name for name in known if name) for known in zip(*told, strict=True)]
