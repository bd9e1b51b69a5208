"""Which noise a sample gets: that of a run's seed, or the fixed noise of held-out data (neither torch nor numpy)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class NoiseSeed:
    """The seed of a run's noise. `run` is None for held-out data, whose noise is the same in every run."""

    run: int | None

    def __str__(self) -> str:
        """The text that random streams are derived from; changing it changes the noise of every run."""
        return "heldout" if self.run is None else str(self.run)


HELDOUT = NoiseSeed(None)
