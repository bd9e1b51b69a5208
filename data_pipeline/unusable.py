"""Samples that cannot be used: what a process has met of them, and when a run has met too many."""

import json
import logging
from collections import Counter
from collections.abc import Iterable, Sequence

from data_pipeline.samples import Fault

logger = logging.getLogger(__name__)

MAX_LOGGED = 10
MAX_SHARDS_TOLD, MAX_SAMPLES_TOLD = 5, 3
# Up to this many a share of them says nothing yet.
MIN_UNUSABLE = 10


class Unusable:
    """Counts the unusable samples that one process meets, over all and by shard, and logs the first ones.

    Args:
        what: what was done with them, for the log.
    """

    def __init__(self, what: str = "passed over") -> None:
        self.num = 0
        self._what = what
        self._by_shard: Counter[str] = Counter()
        self._first: list[str] = []
        self._logged: set[Fault] = set()

    def note(self, faults: Iterable[Fault]) -> None:
        """Count these faults, one for each sample."""
        for fault in faults:
            if len(self._logged) < MAX_LOGGED and fault not in self._logged:
                self._logged.add(fault)
                logger.warning("%s a sample that cannot be used: %s", self._what, fault.message)
            if len(self._first) < MAX_SAMPLES_TOLD:
                self._first.append(fault.message)
            self.num += 1
            self._by_shard[fault.shard] += 1

    def restart(self) -> None:
        """Count from the beginning. What was logged before is not logged again."""
        self.num = 0
        self._by_shard.clear()
        self._first.clear()

    def report(self) -> str:
        """What `told` joins with the reports of other processes: a line of JSON."""
        return json.dumps([dict(self._by_shard.most_common(100)), self._first])


def is_too_many(num_unusable: int, num_samples: int, max_fraction: float) -> bool:
    """Whether a run that has read `num_samples` has met too many: more than the fraction, and more than MIN_UNUSABLE.

    A fraction of 0 allows none at all.
    """
    return num_unusable > (max(MIN_UNUSABLE, max_fraction * num_samples) if max_fraction else 0)


def told(reports: Sequence[str]) -> str:
    """The shards with most unusable samples and the first such samples, from the reports of several processes."""
    by_shard: Counter[str] = Counter()
    first: list[str] = []
    for shards, samples in map(json.loads, reports):
        by_shard.update(shards)
        first += samples
    worst = sorted(by_shard.items(), key=lambda item: (-item[1], item[0]))
    named = ", ".join(f"{shard} ({number:,})" for shard, number in worst[:MAX_SHARDS_TOLD])
    others = f" and {len(worst) - MAX_SHARDS_TOLD:,} more" if len(worst) > MAX_SHARDS_TOLD else ""
    return f"Shards with most of them since this start: {named}{others}. Some: {'; '.join(first[:MAX_SAMPLES_TOLD])}"
