"""Stops a run in which a node computes or stores wrongly: what several ranks hold must be the same on all of them."""

from collections import Counter
from typing import Any

from common.errors import NodeSuspected
from common.wording import count
from parallel.checks.replica_check import MAX_NAMED, Difference, differences
from parallel.ranks.agreement import all_gather_text
from pretrain.training.hooks.hook import Hook, RunView


class HealthHook(Hook):
    """Every `every` steps all ranks compare the weights they hold in common; a difference ends the run on all of them.

    It comes before a checkpoint of the same step is written, so that one never holds weights that just failed.
    """

    def __init__(self, every: int) -> None:
        self._every = every
        self._nodes: list[str] = []

    def on_start(self, run: RunView) -> None:
        self._nodes = all_gather_text(run.node)

    def on_step_end(self, run: RunView, record: dict[str, Any]) -> None:
        if record["step"] % self._every == 0:
            found = differences(run.engine)
            if found:
                raise suspicion(found, self._nodes, record["step"], self._every)


def suspicion(found: list[Difference], nodes: list[str], step: int, every: int) -> NodeSuspected:
    """What to tell and whom to suspect: the rank and node outside the majority, as far as there is one of each."""
    odd = Counter(rank for difference in found for rank in difference.odd)
    ranks = sorted(odd) or sorted({rank for difference in found for rank in difference.holders})
    places = {nodes[rank] for rank in ranks}
    lines = [f"step {step}: {count(len(found), 'weight')} must be the same on several ranks, and "
             f"{'is' if len(found) == 1 else 'are'} not"]
    lines += [f"  {_told(difference, nodes)}" for difference in found[:MAX_NAMED]]
    if len(found) > MAX_NAMED:
        lines.append(f"  and {len(found) - MAX_NAMED} more")
    lines.append(f"Suspected: {_ranks(ranks, nodes)}. Memory or arithmetic of that place may be faulty. The last check "
                 f"that passed was {every} steps before; go on from a checkpoint of then, without "
                 f"{'that node' if len(places) == 1 else 'the faulty one of these nodes'}.")
    return NodeSuspected("\n".join(lines), rank=ranks[0] if len(ranks) == 1 else None,
                         node=places.pop() if len(places) == 1 else None)


def _told(difference: Difference, nodes: list[str]) -> str:
    if difference.odd:
        rest = sorted(set(difference.holders) - set(difference.odd))
        return f"{difference.name}: {_ranks(difference.odd, nodes)} against {_ranks(rest, nodes)}"
    return f"{difference.name}: {_ranks(difference.holders, nodes)} disagree, and no version has a majority"


def _ranks(ranks: tuple[int, ...] | list[int], nodes: list[str]) -> str:
    """`rank 3 on n2`, `ranks 0, 1, 2 on n1`, `ranks 0 on n1, 4 on n2`."""
    word, shown = ("rank" if len(ranks) == 1 else "ranks"), list(ranks[:MAX_NAMED])
    more = f" and {len(ranks) - len(shown)} more" if len(ranks) > len(shown) else ""
    if len({nodes[rank] for rank in ranks}) == 1:
        return f"{word} {', '.join(map(str, shown))}{more} on {nodes[ranks[0]]}"
    return f"{word} {', '.join(f'{rank} on {nodes[rank]}' for rank in shown)}{more}"
