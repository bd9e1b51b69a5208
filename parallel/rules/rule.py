"""A run as the rules see it, and what a rule is (no torch). The table itself is in table.py."""

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd

from parallel.config import ParallelConfig, PrecisionConfig
from parallel.layout import divisors
from parallel.rules.model_traits import ModelTraits


@dataclass(frozen=True)
class Case:
    """One run as the rules see it. `world_size` is the number of ranks, None while it is not known."""

    parallel: ParallelConfig
    precision: PrecisionConfig
    model: ModelTraits
    world_size: int | None = None

    @property
    def head_ranks(self) -> int:
        """Ranks over which attention spreads the heads."""
        return self.parallel.tensor * self.parallel.context

    @property
    def sequence_unit(self) -> int:
        """Ranks over which activations between the matrices are spread along the sequence."""
        return self.parallel.context * (self.parallel.tensor if self.parallel.sequence else 1)

    @property
    def num_ranks(self) -> int:
        """The number of ranks for a message; 0 while it is not known."""
        return self.world_size or 0

    @property
    def data(self) -> int | None:
        """The data degree, None while it is unknown or not whole."""
        if self.world_size is None or self.world_size % self.parallel.model_ranks:
            return None
        return self.world_size // self.parallel.model_ranks

    @property
    def batch_unit(self) -> int:
        """Sequences that all data ranks take in one forward; with an unknown world, those of one data rank."""
        return self.parallel.micro_batch * (self.data or 1)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A combination of settings that cannot run, and the message about it."""

    name: str
    where: str
    broken: Callable[[Case], bool]
    asked: Callable[[Case], str]
    possible: Callable[[Case], str]
    change: Callable[[Case], str]


def nearest_multiples(number: int, unit: int) -> list[int]:
    """The multiples of `unit` just below and above `number`, without 0."""
    below = number // unit * unit
    return [multiple for multiple in (below, below + unit) if multiple > 0]


def legal_tensor_degrees(model: ModelTraits) -> list[int]:
    """Degrees of tensor parallelism that divide every dimension sliced over the tensor ranks."""
    return divisors(gcd(model.heads, model.kv_heads, model.ffn, model.vocab_size, model.expert_ffn,
                        model.shared_expert_ffn))


def legal_expert_degrees(case: Case) -> list[int]:
    """Degrees of expert parallelism that divide the experts and, where their number is known, the data ranks."""
    return divisors(gcd(case.model.experts, case.data or 0) or 1)
