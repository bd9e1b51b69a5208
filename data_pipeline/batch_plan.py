"""Which positions make up which batch: the only arithmetic on positions, without torch.

Step t of a plan takes the positions [first_position + t*G, first_position + (t+1)*G), G being the global batch. Data
rank r of D takes the contiguous block of G/D of them that starts at r*G/D, cut into micro-batches in order.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """How the samples of a dataset are divided into steps, data ranks and micro-batches.

    Args:
        seed: of the order of samples; None is the stored order.
        global_batch: samples in a step, over all data ranks.
        micro_batch: samples in a micro-batch.
        data_rank: this rank's place on the dp axis.
        data_ranks: size of the dp axis.
        first_position: samples that the run has consumed before, as a checkpoint records them.

    Raises ValueError when sizes are out of range, or `global_batch` is no multiple of `micro_batch * data_ranks`.
    """

    seed: int | None
    global_batch: int
    micro_batch: int
    data_rank: int = 0
    data_ranks: int = 1
    first_position: int = 0

    def __post_init__(self) -> None:
        if min(self.global_batch, self.micro_batch, self.data_ranks) < 1 or self.first_position < 0:
            raise ValueError(f"sizes must be at least 1 and the position at least 0: {self}")
        if not 0 <= self.data_rank < self.data_ranks:
            raise ValueError(f"data_rank {self.data_rank} is not below data_ranks {self.data_ranks}")
        if self.global_batch % (self.micro_batch * self.data_ranks):
            raise ValueError(
                f"global_batch {self.global_batch} is not a multiple of micro_batch {self.micro_batch} "
                f"x data_ranks {self.data_ranks}"
            )

    @classmethod
    def heldout(cls, micro_batch: int, data_rank: int = 0, data_ranks: int = 1) -> "BatchPlan":
        """The stored order from its beginning, with one micro-batch for each rank in a step."""
        return cls(seed=None, global_batch=micro_batch * data_ranks, micro_batch=micro_batch, data_rank=data_rank,
                   data_ranks=data_ranks)

    @property
    def micro_batches_per_step(self) -> int:
        """Micro-batches that each rank takes in a step."""
        return self.global_batch // (self.micro_batch * self.data_ranks)

    def positions(self, micro_batch: int) -> range:
        """Positions of this rank's micro-batch number `micro_batch`, counted from the first step of the plan on."""
        step, within = divmod(micro_batch, self.micro_batches_per_step)
        block = self.data_rank * (self.global_batch // self.data_ranks)
        first = self.position_after(step) + block + within * self.micro_batch
        return range(first, first + self.micro_batch)

    def position_after(self, num_steps: int) -> int:
        """Samples that the whole run has consumed after `num_steps` steps of this plan."""
        return self.first_position + num_steps * self.global_batch

    def num_steps(self, num_samples: int) -> int:
        """Steps that `num_samples` samples fill, the last one perhaps in part."""
        return -(-num_samples // self.global_batch)
