"""Processes that make micro-batches ahead of their rank, each through a pipe of its own.

Worker w of W makes the micro-batches w, w + W, w + 2W and so on, and the rank takes from the workers in turn. A thread
of the rank empties each pipe, so read-ahead lies in the rank, and a worker holds nothing that outlives a write. Torch's
DataLoader is not used: its workers wait for their queue's thread when the rank is gone, it reports a killed one through
a signal handler in whatever code of the rank runs then, and arrays pass through it in full width.
"""

import atexit
import logging
import multiprocessing
import os
import queue
import signal
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection

import numpy as np

from common.errors import ExitCode, TrainyardError
from data_pipeline.samples import Fault

logger = logging.getLogger(__name__)

RANK_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
PATIENCE_SECONDS = 30.0  # waited for a batch before the person is told, then twice as long, and so on
POLL_SECONDS = 0.5
END_SECONDS = 5.0
STATES = {"T": "stopped by a signal; `kill -CONT {pid}` lets it go on", "t": "stopped by a debugger",
          "D": "waiting for a disk or a network file system", "R": "computing", "S": "waiting", "Z": "dead"}
HINTS = {
    signal.SIGKILL: "Most often the machine or the job had no memory left (`dmesg` or the job's record says so): lower "
                    "data.workers, or ask for more memory",
    signal.SIGBUS: "A shard was cut while it was read, or its file system failed",
}


# A micro-batch: fields by name, each [micro_batch, ...], and the faults of its samples.
ArrayBatch = tuple[dict[str, np.ndarray], Sequence[Fault]]
# The micro-batches `first`, `first + stride` and so on, without end.
Make = Callable[[int, int], Iterator[ArrayBatch]]


class WorkerLost(TrainyardError):
    """A loader process ended before its rank wanted it to."""


class Workers:
    """Iterates over the micro-batches that `make` gives, made by `num_workers` processes.

    Args:
        make: pickles; called once in each process.
        ahead: micro-batches of each worker that wait in this process.
        patience_seconds: how long the wait for a batch may take before a warning names the worker.

    `next` raises the TrainyardError that a worker met, and WorkerLost for one that was killed or crashed.
    """

    def __init__(self, make: Make, num_workers: int, ahead: int, patience_seconds: float = PATIENCE_SECONDS) -> None:
        self._patience_seconds, self._turn = patience_seconds, 0
        self._workers: list[_Worker] = []
        # When this object is not used any more; and at exit, before multiprocessing's own handler, which would wait for
        # ever for workers that ignore SIGTERM.
        self._end = weakref.finalize(self, _end_all, self._workers)
        atexit.register(self._end)
        with signals_held():
            for number in range(num_workers):
                self._workers.append(_Worker(make, number, num_workers, ahead=ahead))

    def __iter__(self) -> "Workers":
        return self

    def __next__(self) -> ArrayBatch:
        if not self._workers:
            raise StopIteration
        worker = self._workers[self._turn % len(self._workers)]
        self._turn += 1
        return worker.take(self._patience_seconds)

    def close(self) -> None:
        """End the processes; nothing comes afterwards."""
        self._end()
        atexit.unregister(self._end)


class _Worker:
    """One process, seen from the rank."""

    def __init__(self, make: Make, number: int, num_workers: int, *, ahead: int) -> None:
        # spawn: a fork of a rank with threads can deadlock, and a forkserver's workers outlive a killed rank.
        context = multiprocessing.get_context("spawn")
        self._pipe, writer = context.Pipe(duplex=False)
        self._process = context.Process(target=_work, args=(writer, make, number, num_workers), daemon=True,
                                        name=f"loader-{number}")
        self._process.start()
        writer.close()  # so that the end of the process is the end of the pipe
        self._name = f"loader worker {number} (process {self._process.pid})"
        self._closed = False
        self._room = threading.Semaphore(ahead)
        self._received: queue.SimpleQueue[ArrayBatch | Exception] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._receive, name=self._name, daemon=True)
        self._thread.start()

    def _receive(self) -> None:
        try:
            while True:
                self._room.acquire()
                if self._closed:
                    return
                self._received.put(_received(self._pipe))
        except Exception as error:
            self._received.put(error)

    def take(self, patience_seconds: float) -> ArrayBatch:
        """The next micro-batch. Raises as `Workers` does."""
        waited_seconds, limit_seconds = 0.0, patience_seconds
        while True:
            try:
                item = self._received.get(timeout=limit_seconds)
                break
            except queue.Empty:
                waited_seconds += limit_seconds
                limit_seconds = waited_seconds
                logger.warning("the run has waited %.0f s for a batch of %s, which is %s", waited_seconds, self._name,
                               self._state())
        self._room.release()
        if not isinstance(item, Exception):
            return item
        self._received.put(item)  # this is the end: whoever asks again gets the same answer
        raise self._lost() if isinstance(item, EOFError | OSError) else item

    def _state(self) -> str:
        try:
            with open(f"/proc/{self._process.pid}/stat", encoding="ascii", errors="replace") as file:
                letter = file.read().rpartition(")")[2].split()[0]
        except (OSError, IndexError):
            return "in an unknown state"
        return STATES.get(letter, f"in state {letter}").format(pid=self._process.pid)

    def _lost(self) -> WorkerLost:
        self._process.join(END_SECONDS)
        code = self._process.exitcode
        if code is None:
            return WorkerLost(f"{self._name} closed its pipe and lives on")
        if code >= 0:
            return WorkerLost(f"{self._name} ended with exit code {code} while batches were wanted from it")
        number = signal.Signals(-code)
        hint = HINTS.get(number, "A library in it crashed; data.workers=0 shows where")
        return WorkerLost(f"{self._name} was ended by signal {-code} ({number.name}). {hint}. Training goes on from "
                          "the last checkpoint when it is started again",
                          ExitCode.STORAGE if number == signal.SIGBUS else None)

    def kill(self) -> None:
        """A worker only reads, so nothing is lost when it is killed; a stopped one ends too."""
        self._closed = True
        self._process.kill()

    def ended(self) -> None:
        """Wait for the process and the thread."""
        self._process.join(END_SECONDS)
        self._room.release()
        self._thread.join(END_SECONDS)


def _end_all(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.ended()
    workers.clear()


@contextmanager
def signals_held() -> Iterator[None]:
    """Hold the rank's signals back while workers start: they inherit the mask and are safe before they can ignore."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, RANK_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# -- in the worker --------------------------------------------------------------------------------------------------


def _work(pipe: Connection, make: Make, number: int, num_workers: int) -> None:
    """The whole life of a worker. It ignores the rank's signals: the rank finishes its step and then ends it."""
    for ignored in RANK_SIGNALS:
        signal.signal(ignored, signal.SIG_IGN)
    threading.Thread(target=_leave_with_the_rank, daemon=True).start()
    try:
        for batch in make(number, num_workers):
            _send(pipe, batch)
    except BrokenPipeError:  # the rank is gone
        os._exit(0)
    except TrainyardError as error:
        pipe.send(error)
    except Exception:
        pipe.send(RuntimeError(f"in loader worker {number}:\n{traceback.format_exc()}"))


def _leave_with_the_rank() -> None:
    """A thread of the worker: ends the process, whatever it does at that moment, once the rank is gone.

    Not prctl(PR_SET_PDEATHSIG), which fires when the thread that made the worker ends.
    """
    rank = multiprocessing.parent_process()
    # The parent too: a process that the rank forked may keep the pipe open by which `rank` knows of the end.
    while rank is not None and rank.is_alive() and os.getppid() == rank.pid:
        rank.join(POLL_SECONDS)
    os._exit(0)


# -- the pipe: a pickled list of fields and faults, then the bytes of each array ------------------------------------


def narrowed(array: np.ndarray) -> np.ndarray:
    """Numbers of int64 in the smallest of the types that a pipe carries them in: two bytes for most vocabularies."""
    if array.dtype == np.int64 and array.size:
        low, high = array.min(), array.max()
        for dtype in (np.uint16, np.uint32, np.int32):
            if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
                return array.astype(dtype)
    return np.ascontiguousarray(array)


def _send(pipe: Connection, batch: ArrayBatch) -> None:
    fields, faults = batch
    sent = {name: narrowed(array) for name, array in fields.items()}
    pipe.send(([(name, array.dtype, fields[name].dtype, array.shape) for name, array in sent.items()], list(faults)))
    for array in sent.values():
        content = array.reshape(-1).view(np.uint8).data
        while len(content):
            content = content[os.write(pipe.fileno(), content):]


def _received(pipe: Connection) -> ArrayBatch:
    """Raises what the worker met, EOFError or OSError where it is gone."""
    head = pipe.recv()
    if isinstance(head, Exception):
        raise head
    batch = {}
    for name, sent, dtype, shape in head[0]:
        batch[name] = np.empty(shape, dtype)
        array = batch[name] if sent == dtype else np.empty(shape, sent)
        _fill(pipe.fileno(), array.reshape(-1).view(np.uint8).data)
        if array is not batch[name]:
            batch[name][...] = array
    return batch, head[1]


def _fill(descriptor: int, content: memoryview) -> None:
    while len(content):
        num_bytes = os.readv(descriptor, [content])
        if not num_bytes:
            raise EOFError
        content = content[num_bytes:]
