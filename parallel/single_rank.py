"""A world of one process, for models that are used and not trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from parallel.layout import Layout
from parallel.process_groups import Groups, build_groups, destroy_groups
from parallel.ranks.rank_info import alone
from parallel.ranks.rendezvous import join, leave


@contextmanager
def single_rank() -> Iterator[Groups]:
    """A world of this process alone, without DeepSpeed; nothing listens, and no later start believes in a launcher."""
    join(alone(), exports=False)
    try:
        yield build_groups(Layout())
    finally:
        destroy_groups()
        leave()
