"""From a dataset to micro-batches: an ordered source, then webdataset stages, in this process or in workers.

The plan (batch_plan.py) says which positions make up which micro-batch. Workers take micro-batches in turn, and the
loader takes from workers in turn, so the stream is the same for any number of them.
"""

import atexit
import logging
import signal
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from itertools import count
from typing import TypeVar

import numpy as np
import torch
import webdataset
from torch.utils.data import DataLoader, get_worker_info

from common.errors import DataError
from data_pipeline.batch_plan import BatchPlan
from data_pipeline.samples import Dataset

logger = logging.getLogger(__name__)

TensorBatch = dict[str, torch.Tensor]
Item = TypeVar("Item")

FAULTS = "faults"
MAX_FAULTS_NAMED = 10
# Below this many faults a share of them says nothing.
MIN_FAULTS = 10
RANK_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@dataclass(frozen=True)
class ReadOptions:
    """How the samples at planned positions are read.

    Args:
        sequence_length: tokens per sample, not counting the last target.
        stages: further webdataset stages on single samples, after reading; each gives one sample for one.
        workers: loader processes; they read one step ahead. 0 reads in this process.
        max_bad_fraction: more unusable samples than this share of those read end the run.
    """

    sequence_length: int
    _: KW_ONLY
    stages: Sequence[Callable] = ()
    workers: int = 0
    max_bad_fraction: float = 0.01


@dataclass(frozen=True)
class OrderedSource:
    """First stage: samples with their `position` and what the dataset reads there, in this process's turn."""

    dataset: Dataset
    sequence_length: int
    plan: BatchPlan

    def __call__(self) -> Iterator[dict]:
        samples = self.dataset.samples(self.sequence_length, self.plan.seed)
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        for number in count(first, stride):
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
class Failure:
    """A DataError on its way out of a worker, without the worker's traceback wrapped around it."""

    message: str


def failures_as_items(source: Iterator[dict[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray] | Failure]:
    """Last stage: a DataError ends the stream as its last item."""
    try:
        yield from source
    except DataError as error:
        yield Failure(error.message)


def stack(samples: Sequence[dict]) -> dict[str, np.ndarray]:
    """The arrays of samples stacked by field: {"tokens": int64 [len(samples), sequence_length + 1]}.

    Still arrays: they come out of a worker several times faster than tensors, which travel as shared memory files.
    """
    fields = [name for name, value in samples[0].items() if isinstance(value, np.ndarray)]
    batch = {name: np.stack([sample[name] for sample in samples]) for name in fields}
    faults = [fault for sample in samples for fault in sample.get(FAULTS, ())]
    return {**batch, FAULTS: np.array(faults)} if faults else batch


def each(transform: Callable[[dict], dict]) -> Callable:
    """A stage that transforms every sample by itself."""
    return webdataset.map(transform)


def unchanged(item: Item) -> Item:
    """Keeps torch from turning arrays into tensors inside a worker."""
    return item


def as_tensors(arrays: dict[str, np.ndarray]) -> TensorBatch:
    """The same memory as tensors."""
    return {name: torch.from_numpy(array) for name, array in arrays.items() if name != FAULTS}


def leave_signals_to_the_rank(worker_id: int) -> None:
    """A worker ignores Ctrl-C and a job's warning signal: the rank finishes its step and then stops its workers."""
    for number in RANK_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def signals_held() -> Iterator[None]:
    """Hold the rank's signals back while workers start: they inherit the mask and are safe before they can ignore."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, RANK_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Loader:
    """Iterates over steps: `next(loader)` is the list of this data rank's micro-batches of one step, without end.

    Each micro-batch holds the fields of the dataset's samples, stacked: for text {"tokens": int64 [micro_batch,
    sequence_length + 1]}; or what `read.stages` make of them. Starting at a position costs the same for any position.

    Args:
        dataset: the training set.
        plan: which samples this rank takes, and where the run goes on.
        read: how they are read.

    `next` raises DataError when the data is damaged. Close it, or use it in a `with`, to end its workers.
    """

    def __init__(self, dataset: Dataset, plan: BatchPlan, read: ReadOptions) -> None:
        self.plan, self.read = plan, read
        # Built here as well so that a dataset that is too small is reported before any worker starts.
        self.samples_per_epoch = dataset.samples(read.sequence_length, plan.seed).per_epoch
        self.num_read = self.num_bad = 0  # samples of this rank, in this process
        self._num_steps = 0  # handed out, whatever was read ahead
        pipeline = webdataset.DataPipeline(
            OrderedSource(dataset, read.sequence_length, plan),
            *read.stages,
            Batch(plan.micro_batch),
            failures_as_items,
        )
        self._stream = self._start(pipeline)
        # Before multiprocessing's own exit handler, which would wait for ever for workers that ignore SIGTERM.
        atexit.register(_close_at_exit, weakref.ref(self))

    def _start(self, pipeline: webdataset.DataPipeline) -> Iterator[dict[str, np.ndarray] | Failure]:
        workers = self.read.workers
        if workers == 0:
            return iter(pipeline)
        loader = DataLoader(
            pipeline,
            batch_size=None,
            collate_fn=unchanged,
            num_workers=workers,
            prefetch_factor=-(-self.plan.micro_batches_per_step // workers),
            worker_init_fn=leave_signals_to_the_rank,
            # spawn: a fork of a rank with threads can deadlock, and a forkserver's workers outlive a killed rank.
            multiprocessing_context="spawn",
        )
        with signals_held():
            return iter(loader)

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> list[TensorBatch]:
        micro_batches = []
        for _ in range(self.plan.micro_batches_per_step):
            item = next(self._stream)
            if isinstance(item, Failure):
                raise DataError(item.message)
            self._count(item)
            micro_batches.append(as_tensors(item))
        self._num_steps += 1
        return micro_batches

    @property
    def position(self) -> int:
        """Samples that the whole run has consumed; a step counts when it is handed out."""
        return self.plan.position_after(self._num_steps)

    @property
    def epoch(self) -> float:
        """Epochs consumed so far; 1.5 is half-way through the second."""
        return self.position / self.samples_per_epoch

    def _count(self, batch: dict[str, np.ndarray]) -> None:
        """Count unusable samples and name the first ones. Raises DataError when there are too many of them."""
        faults = tuple(batch.get(FAULTS, ()))
        self.num_read += self.plan.micro_batch + len(faults)
        for fault in faults[: max(0, MAX_FAULTS_NAMED - self.num_bad)]:
            logger.warning("passed over a sample that cannot be used: %s", fault)
        self.num_bad += len(faults)
        if self.num_bad > max(MIN_FAULTS, self.read.max_bad_fraction * self.num_read):
            raise DataError(
                f"{self.num_bad:,} of {self.num_read:,} samples cannot be used, more than the part "
                f"{self.read.max_bad_fraction:g} that data.max_bad_fraction allows; the last one: {faults[-1]}"
            )

    def close(self) -> None:
        """End the workers. The loader gives nothing afterwards."""
        stream, self._stream = self._stream, iter(())
        # Explicitly: a traceback that is being handled may keep the stream, and so its workers, alive.
        if hasattr(stream, "_shutdown_workers"):
            stream._shutdown_workers()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def heldout_batches(
    dataset: Dataset, plan: BatchPlan, read: ReadOptions, num_samples: int | None = None
) -> Iterator[TensorBatch]:
    """Yield this rank's micro-batches of the first `num_samples` samples (None: one epoch), then end.

    Each holds the fields of a training batch and "weights", float32: [micro_batch, sequence_length] for text, or what
    the dataset's samples and `read.stages` make of it. Every rank yields the same number of micro-batches. Where the
    samples do not divide, the last micro-batches are padded with the first sample at weight 0, so
    sum(weights * loss) / sum(weights) over all ranks is the exact mean on any layout.

    Args:
        dataset: the held-out set.
        plan: usually `BatchPlan.heldout`.
        read: `workers` and `max_bad_fraction` are not used: this process reads, and unusable samples are replaced.
        num_samples: samples over all ranks; not more than an epoch are taken.

    Raises UserError when the set holds less than one sample, DataError when it is damaged.
    """
    source = dataset.samples(read.sequence_length, plan.seed)
    num_real = source.per_epoch if num_samples is None else min(num_samples, source.per_epoch)
    end = plan.first_position + num_real
    num_micro_batches = plan.num_steps(num_real) * plan.micro_batches_per_step

    def planned() -> Iterator[int]:
        for number in range(num_micro_batches):
            yield from plan.positions(number)

    def samples() -> Iterator[dict]:
        for position in planned():
            real = position if position < end else plan.first_position
            yield {"position": real, **source.sample(real)}

    def with_weights(made: Iterator[dict]) -> Iterator[dict]:
        for position, sample in zip(planned(), made, strict=True):
            weights = sample.get("weights", np.ones(source.weights_shape, dtype=np.float32))
            yield {**sample, "weights": np.asarray(weights * np.float32(position < end))}

    pipeline = webdataset.DataPipeline(samples, *read.stages, with_weights, Batch(plan.micro_batch))
    yield from map(as_tensors, pipeline)


def _close_at_exit(reference: weakref.ref) -> None:
    loader = reference()
    if loader is not None:
        loader.close()
