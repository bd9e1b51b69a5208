"""From a dataset to micro-batches: an ordered source, then webdataset stages, in this process or in workers.

The plan (batch_plan.py) says which positions make up which micro-batch. Workers take micro-batches in turn, and the
loader takes from workers in turn, so the stream is the same for any number of them.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import count

import numpy as np
import torch
import webdataset

from data_pipeline.batch_plan import BatchPlan
from data_pipeline.samples import Dataset, Fault
from data_pipeline.unusable import Unusable
from data_pipeline.workers import ArrayBatch, Workers

TensorBatch = dict[str, torch.Tensor]

FAULTS = "faults"


@dataclass(frozen=True)
class ReadOptions:
    """How the samples at planned positions are read.

    Args:
        sequence_length: tokens per sample, not counting the last target.
        stages: further webdataset stages on single samples, after reading; each gives one sample for one.
        workers: loader processes; they read one step ahead. 0 reads in this process.
        pinned: whether training batches lie in pinned memory, which copies to an accelerator need to be asynchronous.
    """

    sequence_length: int
    _: KW_ONLY
    stages: Sequence[Callable] = ()
    workers: int = 0
    pinned: bool = False


@dataclass(frozen=True)
class OrderedSource:
    """First stage: samples with their `position` and what the dataset reads there.

    They are those of the micro-batches `first`, `first + stride` and so on.
    """

    dataset: Dataset
    sequence_length: int
    plan: BatchPlan
    _: KW_ONLY
    first: int
    stride: int

    def __call__(self) -> Iterator[dict]:
        samples = self.dataset.samples(self.sequence_length, self.plan.seed)
        for number in count(self.first, self.stride):
            for position in self.plan.positions(number):
                yield {"__key__": str(position), "position": position, **samples.sample(position)}


@dataclass(frozen=True)
class Batch:
    """Stage: `size` samples to one micro-batch; fields with arrays are stacked, others dropped.

    Used instead of `webdataset.batched`, which reads a sample too far before it hands a full batch out.
    """

    size: int

    def __call__(self, source: Iterator[dict]) -> Iterator[dict[str, np.ndarray]]:
        samples: list[dict] = []
        for sample in source:
            samples.append(sample)
            if len(samples) == self.size:
                yield stack(samples)
                samples = []


@dataclass(frozen=True)
class MakeMicroBatches:
    """A rank's micro-batches, or every `stride`-th of them: what this process or a worker does."""

    dataset: Dataset
    plan: BatchPlan
    read: ReadOptions

    def __call__(self, first: int, stride: int) -> Iterator[ArrayBatch]:
        size = self.plan.micro_batch
        source = OrderedSource(self.dataset, self.read.sequence_length, self.plan, first=first, stride=stride)
        aside: deque[Sequence[Fault]] = deque()  # stages may drop entries that they do not know

        def samples() -> Iterator[dict]:
            for sample in source():
                aside.append(sample.pop(FAULTS, ()))
                yield sample

        for arrays in webdataset.DataPipeline(samples, *self.read.stages, Batch(size)):
            yield arrays, [fault for _ in range(size) for fault in aside.popleft()]


@dataclass(frozen=True)
class InWorker:
    """The same in a worker, where one thread for torch is enough: there are as many workers as a person wants."""

    make: MakeMicroBatches

    def __call__(self, first: int, stride: int) -> Iterator[ArrayBatch]:
        torch.set_num_threads(1)
        return self.make(first, stride)


def stack(samples: Sequence[dict]) -> dict[str, np.ndarray]:
    """The arrays of samples stacked by field: {"tokens": int64 [len(samples), sequence_length + 1]}."""
    fields = [name for name, value in samples[0].items() if isinstance(value, np.ndarray)]
    return {name: np.stack([sample[name] for sample in samples]) for name in fields}


def as_tensors(arrays: dict[str, np.ndarray], pinned: bool = False) -> TensorBatch:
    """The same memory as tensors, or pinned copies."""
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return {name: tensor.pin_memory() for name, tensor in tensors.items()} if pinned else tensors


def each(transform: Callable[[dict], dict]) -> Callable:
    """A stage that transforms every sample by itself."""
    return webdataset.map(transform)


class Loader:
    """Iterates over steps: `next(loader)` is the list of this data rank's micro-batches of one step, without end.

    Each micro-batch holds the fields of the dataset's samples, stacked: for text {"tokens": int64 [micro_batch,
    sequence_length + 1]}; or what `read.stages` make of them. Starting at a position costs the same for any position.

    Args:
        dataset: the training set.
        plan: which samples this rank takes, and where the run goes on.
        read: how they are read.

    `unusable` counts the samples handed out of which the record could not be used. `next` raises DataError when the
    data is damaged, WorkerLost when a worker was killed. Close it, or use it in a `with`, to end its workers.
    """

    def __init__(self, dataset: Dataset, plan: BatchPlan, read: ReadOptions) -> None:
        self.plan = plan
        # Built here as well so that a dataset that is too small is reported before any worker starts.
        self.samples_per_epoch = dataset.samples(read.sequence_length, plan.seed).per_epoch
        self.unusable = Unusable()
        self._num_steps = 0  # handed out, whatever was read ahead
        make = MakeMicroBatches(dataset, plan, read)
        self._pinned = read.pinned
        self._workers = Workers(InWorker(make), read.workers, -(-plan.micro_batches_per_step // read.workers)) \
            if read.workers else None
        self._stream: Iterator[ArrayBatch] = self._workers or make(0, 1)

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> list[TensorBatch]:
        micro_batches = [next(self._stream) for _ in range(self.plan.micro_batches_per_step)]
        for _, faults in micro_batches:
            self.unusable.note(faults)
        self._num_steps += 1
        return [as_tensors(arrays, self._pinned) for arrays, _ in micro_batches]

    @property
    def position(self) -> int:
        """Samples that the whole run has consumed; a step counts when it is handed out."""
        return self.plan.position_after(self._num_steps)

    @property
    def epoch(self) -> float:
        """Epochs consumed so far; 1.5 is half-way through the second."""
        return self.position / self.samples_per_epoch

    def close(self) -> None:
        """End the workers. The loader gives nothing afterwards."""
        self._stream = iter(())
        if self._workers:
            self._workers.close()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def heldout_batches(dataset: Dataset, plan: BatchPlan, read: ReadOptions, num_samples: int | None = None, *,
                    unusable: Unusable | None = None) -> Iterator[TensorBatch]:
    """Yield this rank's micro-batches of the first `num_samples` samples (None: one epoch), then end.

    Each holds the fields of a training batch and "weights", float32: [micro_batch, sequence_length] for text, or what
    the dataset's samples and `read.stages` make of it. Every rank yields the same number of micro-batches. Where the
    samples do not divide, the last micro-batches are padded with the first sample at weight 0, and a sample that cannot
    be used has weight 0 too. So sum(weights * loss) / sum(weights) over all ranks is the exact mean over the samples
    that can be used, on any layout.

    Args:
        dataset: the held-out set.
        plan: usually `BatchPlan.heldout`.
        read: `workers` and `pinned` are not used: this process reads.
        num_samples: samples over all ranks; not more than an epoch are taken.
        unusable: counts this rank's samples that cannot be used.

    Raises UserError when the set holds less than one sample, DataError when it is damaged.
    """
    source = dataset.samples(read.sequence_length, plan.seed)
    num_real = source.per_epoch if num_samples is None else min(num_samples, source.per_epoch)
    end = plan.first_position + num_real
    num_micro_batches = plan.num_steps(num_real) * plan.micro_batches_per_step

    def planned() -> Iterator[int]:
        for number in range(num_micro_batches):
            yield from plan.positions(number)

    counts: deque[bool] = deque()  # whether each sample does; stages may drop entries that they do not know

    def samples() -> Iterator[dict]:
        for position in planned():
            real = position if position < end else plan.first_position
            sample = source.sample(real)
            faults = sample.pop(FAULTS, ())
            if unusable is not None and position < end:
                unusable.note(faults)
            counts.append(position < end and not faults)
            yield {"position": real, **sample}

    def with_weights(made: Iterator[dict]) -> Iterator[dict]:
        for sample in made:
            weights = sample.get("weights", np.ones(source.weights_shape, dtype=np.float32))
            yield {**sample, "weights": np.asarray(weights * np.float32(counts.popleft()))}

    for arrays in webdataset.DataPipeline(samples, *read.stages, with_weights, Batch(plan.micro_batch)):
        yield as_tensors(arrays)
