"""From a dataset to micro-batches: an ordered source, then webdataset stages, in this process or in workers.

Step t consumes positions [t*G, (t+1)*G) of the order, G being the global batch. Data rank r of D takes the contiguous
block of G/D positions that starts at t*G + r*G/D, cut into micro-batches in order. Workers take micro-batches in turn,
and the loader takes from workers in turn, so the stream is the same for any number of them.
"""

import atexit
import logging
import signal
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Protocol

import numpy as np
import torch
import webdataset
from torch.utils.data import DataLoader, get_worker_info

from common.errors import DataError

logger = logging.getLogger(__name__)

MicroBatch = dict[str, torch.Tensor]

FAULTS = "faults"
MAX_FAULTS_NAMED = 10
# Below this many faults a share of them says nothing.
MIN_FAULTS = 10
RANK_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@dataclass(frozen=True)
class Share:
    """Which positions one data rank takes: pure arithmetic.

    Args: global_batch and micro_batch in samples, data_rank of data_size, start_position in samples of the whole run.
    Raises ValueError when the global batch does not divide.
    """

    global_batch: int
    micro_batch: int
    data_rank: int
    data_size: int
    start_position: int = 0

    def __post_init__(self) -> None:
        if min(self.global_batch, self.micro_batch, self.data_size) < 1 or self.start_position < 0:
            raise ValueError(f"sizes must be at least 1 and the position at least 0: {self}")
        if not 0 <= self.data_rank < self.data_size:
            raise ValueError(f"data_rank {self.data_rank} is not below data_size {self.data_size}")
        if self.global_batch % (self.micro_batch * self.data_size):
            raise ValueError(
                f"global_batch {self.global_batch} is not a multiple of micro_batch {self.micro_batch} "
                f"x data_size {self.data_size}"
            )

    @property
    def micro_batches_per_step(self) -> int:
        """Micro-batches that this rank takes in each step."""
        return self.global_batch // (self.micro_batch * self.data_size)

    def positions(self, number: int) -> range:
        """Positions of this rank's micro-batch `number`, counted from the start position on."""
        step, within = divmod(number, self.micro_batches_per_step)
        block = self.data_rank * (self.global_batch // self.data_size)
        first = self.start_position + step * self.global_batch + block + within * self.micro_batch
        return range(first, first + self.micro_batch)


class Samples(Protocol):
    """Samples as a pure function of their position; positions go on through all epochs.

    A sample is a dict of arrays; an entry `faults` lists what was found unusable and passed over on the way to it.
    """

    per_epoch: int
    weights_shape: tuple[int, ...]  # of what says which targets of a sample count

    def sample(self, position: int) -> dict: ...


class Dataset(Protocol):
    """A finished folder of any kind, open for reading; it pickles, so that a loader process can have its own."""

    def samples(self, sequence_length: int, seed: int | None) -> Samples: ...


@dataclass(frozen=True)
class OrderedSource:
    """First stage: samples with their `position` and what the dataset reads there, in this process's turn."""

    dataset: Dataset
    sequence_length: int
    seed: int
    share: Share

    def __call__(self) -> Iterator[dict]:
        samples = self.dataset.samples(self.sequence_length, self.seed)
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        for number in count(first, stride):
            for position in self.share.positions(number):
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


def unchanged(item: dict[str, np.ndarray] | Failure) -> dict[str, np.ndarray] | Failure:
    """Keeps torch from turning arrays into tensors inside a worker."""
    return item


def as_tensors(arrays: dict[str, np.ndarray]) -> MicroBatch:
    """The same memory as tensors."""
    return {name: torch.from_numpy(array) for name, array in arrays.items() if name != FAULTS}


def leave_signals_to_the_rank(worker_id: int) -> None:
    """A worker outlives Ctrl-C and a job's warning signal: the rank finishes its step and then stops its workers."""
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
    sequence_length + 1]}; or what `stages` make of them. `position` is the number of samples that
    the whole run has consumed; it counts a step when it is handed out, whatever was read ahead. Starting at a position
    costs the same for any position.

    Args:
        dataset: the training set.
        sequence_length: tokens per sample, not counting the last target.
        seed: the run's seed.
        global_batch, micro_batch: samples per step over all ranks, and per micro-batch.
        data_rank, data_size: this rank's place on the dp axis.
        workers: loader processes; they read one step ahead. 0 reads in this process.
        start_position: samples consumed before, as saved in a checkpoint.
        stages: further webdataset stages on single samples, after reading; each gives one sample for one.
        max_bad_fraction: more unusable samples than this share of those read end the run.

    `next` raises DataError when the data is damaged. Close it, or use it in a `with`, to end its workers.
    """

    def __init__(
        self,
        dataset: Dataset,
        sequence_length: int,
        seed: int,
        global_batch: int,
        micro_batch: int,
        data_rank: int = 0,
        data_size: int = 1,
        workers: int = 0,
        start_position: int = 0,
        stages: Sequence[Callable] = (),
        max_bad_fraction: float = 0.01,
    ) -> None:
        self.share = Share(global_batch, micro_batch, data_rank, data_size, start_position)
        self.position = start_position
        # Built here as well so that a dataset that is too small is reported before any worker starts.
        self.samples_per_epoch = dataset.samples(sequence_length, seed).per_epoch
        self.max_bad_fraction = max_bad_fraction
        self.num_read = self.num_bad = 0  # by this rank, in this process
        pipeline = webdataset.DataPipeline(
            OrderedSource(dataset, sequence_length, seed, self.share),
            *stages,
            Batch(micro_batch),
            failures_as_items,
        )
        self._stream = self._start(pipeline, workers)
        # Before multiprocessing's own exit handler, which would wait for ever for workers that ignore SIGTERM.
        atexit.register(_close_at_exit, weakref.ref(self))

    def _start(self, pipeline: webdataset.DataPipeline, workers: int) -> Iterator[dict[str, np.ndarray] | Failure]:
        if workers == 0:
            return iter(pipeline)
        loader = DataLoader(
            pipeline,
            batch_size=None,
            collate_fn=unchanged,
            num_workers=workers,
            prefetch_factor=-(-self.share.micro_batches_per_step // workers),
            worker_init_fn=leave_signals_to_the_rank,
            # spawn: a fork of a rank with threads can deadlock, and a forkserver's workers outlive a killed rank.
            multiprocessing_context="spawn",
        )
        with signals_held():
            return iter(loader)

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> list[MicroBatch]:
        micro_batches = []
        for _ in range(self.share.micro_batches_per_step):
            item = next(self._stream)
            if isinstance(item, Failure):
                raise DataError(item.message)
            self._count(item)
            micro_batches.append(as_tensors(item))
        self.position += self.share.global_batch
        return micro_batches

    @property
    def epoch(self) -> float:
        """Epochs consumed so far; 1.5 is half-way through the second."""
        return self.position / self.samples_per_epoch

    def _count(self, batch: dict[str, np.ndarray]) -> None:
        """Count unusable samples and name the first ones. Raises DataError when there are too many of them."""
        faults = batch.get(FAULTS, ())
        self.num_read += self.share.micro_batch + len(faults)
        for fault in faults[: max(0, MAX_FAULTS_NAMED - self.num_bad)]:
            logger.warning("passed over a sample that cannot be used: %s", fault)
        self.num_bad += len(faults)
        if self.num_bad > max(MIN_FAULTS, self.max_bad_fraction * self.num_read):
            raise DataError(
                f"{self.num_bad:,} of {self.num_read:,} samples cannot be used, more than the part "
                f"{self.max_bad_fraction:g} that data.max_bad_fraction allows; the last one: {faults[-1]}"
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
    dataset: Dataset,
    sequence_length: int,
    micro_batch: int,
    num_samples: int | None = None,
    data_rank: int = 0,
    data_size: int = 1,
    stages: Sequence[Callable] = (),
) -> Iterator[MicroBatch]:
    """Yield this rank's micro-batches of the held-out set: its first `num_samples` samples (None: all), never shuffled.

    Each is {"tokens": int64 [micro_batch, sequence_length + 1], "weights": float32 [micro_batch, sequence_length]} for
    text, or what the dataset's samples and `stages` make of it: further webdataset stages on single samples, as in the
    Loader. Every rank yields the same number of them. Where samples do not divide, the last ones are filled up with the
    first sample, its weights being 0, so sum(weights * loss) / sum(weights) over all ranks is the exact mean on any
    layout. Raises DataError when the set holds less than one sample, or is damaged.
    """
    source = dataset.samples(sequence_length, seed=None)
    num_real = source.per_epoch if num_samples is None else min(num_samples, source.per_epoch)
    per_round = micro_batch * data_size

    def samples() -> Iterator[dict]:
        for first in range(data_rank * micro_batch, -(-num_real // per_round) * per_round, per_round):
            for number in range(first, first + micro_batch):
                position = number if number < num_real else 0
                yield {"position": position, **source.sample(position)}

    def with_weights(made: Iterator[dict]) -> Iterator[dict]:
        for number, sample in enumerate(made):
            turn, within = divmod(number, micro_batch)
            is_real = turn * per_round + data_rank * micro_batch + within < num_real
            weights = sample.get("weights", np.ones(source.weights_shape, dtype=np.float32))
            yield {**sample, "weights": np.asarray(weights * np.float32(is_real))}

    pipeline = webdataset.DataPipeline(samples, *stages, with_weights, Batch(micro_batch))
    yield from map(as_tensors, pipeline)


def _close_at_exit(reference: weakref.ref) -> None:
    loader = reference()
    if loader is not None:
        loader.close()
