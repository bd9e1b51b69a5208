"""The contract between data and the loader: a dataset gives samples, and samples are addressed by their position."""

from typing import NamedTuple, Protocol


class Fault(NamedTuple):
    """Why the record that should stand at a position cannot be used.

    Args:
        shard: the file that holds it.
        message: the record and the reason, for a person.
    """

    shard: str
    message: str


class Samples(Protocol):
    """Samples by position. `sample(position)` is a pure function of the position and of what the object was made from.

    The loader, the resume and the layout invariance of a run rest on these rules:

    - Positions start at 0 and go on without end; position `p` lies in epoch `p // per_epoch`.
    - The same position gives the same sample on every rank, in every process, in any order of calls. An object may
      cache, but what it read before never changes what it returns. Any position costs about the same.
    - A sample is a dict. Its arrays have the same names, types and shapes at every position, because the loader stacks
      them. Other entries do not reach a batch. `faults` is a list with a `Fault` where the record of this position
      cannot be used and another stands in for it, and else empty: a function of the position too, so that counts are
      the same on every layout. Training counts faults, and held-out evaluation gives such a sample no weight.
    - `weights_shape` is the shape of the float32 array `weights` that says which targets of a sample count. A sample
      without that entry counts with all its targets.

    A class that wraps others is a `Samples` too, and neither the loader nor the stages have to know it:

    - A mixture is a `Dataset` whose `samples` asks each of its parts for theirs. It maps a position to (part, position
      within the part). Both must be functions of (seed, position) alone: for example, each block of positions holds a
      fixed number of samples of each part in a shuffled order, so that the position within a part is counted without
      reading. All parts have the same arrays and the same `weights_shape`.
    - Packing joins short samples of another `Samples` to rows of `sequence_length + 1` tokens and adds `segments`, an
      int64 array of the shape of `tokens`: the number, within the row, of the document that a token belongs to. Which
      samples share a row must follow from (seed, epoch) and from the lengths in the dataset's index.
    """

    per_epoch: int
    weights_shape: tuple[int, ...]

    def sample(self, position: int) -> dict:
        """The sample at `position`. Raises DataError where the data is damaged."""
        ...


class Dataset(Protocol):
    """A source of samples, open for reading. It pickles, so that each loader process opens its own."""

    def samples(self, sequence_length: int, seed: int | None) -> Samples:
        """Samples of `sequence_length` tokens in the order of `seed`; None: in stored order, without augmentation.

        Raises UserError when the dataset holds less than one sample.
        """
        ...
