"""Loader processes: what comes through the pipe, what is said of a lost one, and that none outlives its rank."""

import gc
import logging
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import DataError, ExitCode
from data_pipeline.samples import Fault
from data_pipeline.workers import WorkerLost, Workers, narrowed

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="needs /proc")


class Numbers:
    """Batches that name their worker and turn, in every type that a batch may have."""

    def __call__(self, first, stride):
        turn = first
        while True:
            yield batch_of(turn), [Fault("shard", f"fault {turn}")] if turn % 3 == 0 else []
            turn += stride


def batch_of(turn: int) -> dict[str, np.ndarray]:
    return {"tokens": np.arange(6).reshape(2, 3) + turn, "labels": np.array([[-100, turn]]), "ends": np.array(turn),
            "large": np.array([2**40 + turn]), "weights": np.array([0.5, turn], np.float32),
            "mask": np.array([True, False]), "pixels": np.full((2, 3, 4), turn % 256, np.uint8),
            "nothing": np.zeros((0, 2), np.int64)}


class Ends:
    """One batch, and then the process does what it is told to."""

    def __init__(self, how: str):
        self.how = how

    def __call__(self, first, stride):
        yield {"pid": np.array(os.getpid())}, []
        if self.how == "damage":
            raise DataError("document 7 is damaged")
        if self.how == "defect":
            raise KeyError("no such field")
        os._exit(3) if self.how == "exit" else os.kill(os.getpid(), getattr(signal, self.how))
        time.sleep(600)


class Large:
    """Batches of a mebibyte, far more than a pipe takes; `busy`: after the first one it computes without end."""

    def __init__(self, busy: bool = False):
        self.busy = busy

    def __call__(self, first, stride):
        while True:
            yield {"pid": np.array(os.getpid()), "rows": np.ones(1 << 18, np.float32)}, []
            while self.busy:
                pass


@pytest.mark.parametrize("num_workers", [1, 2])
def test_batches_come_in_turn_and_unchanged(num_workers):
    workers = Workers(Numbers(), num_workers, 2)
    for turn in range(7):
        fields, faults = next(workers)
        expected = batch_of(turn)
        assert fields.keys() == expected.keys()
        assert all(fields[name].dtype == expected[name].dtype for name in fields)
        assert all(np.array_equal(fields[name], expected[name]) for name in fields)
        assert [fault.message for fault in faults] == ([f"fault {turn}"] if turn % 3 == 0 else [])
    workers.close()
    with pytest.raises(StopIteration):
        next(workers)


@given(st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-200, 70_000), min_size=1))
def test_narrow_numbers_are_the_same(numbers):
    array = np.array(numbers, np.int64)
    assert narrowed(array).astype(np.int64).tolist() == numbers
    if min(numbers) >= 0 and max(numbers) < 2**16:
        assert narrowed(array).itemsize == 2


@pytest.mark.parametrize(("how", "code", "told"), [
    ("SIGKILL", ExitCode.INTERNAL, r"loader worker 0 \(process {pid}\) was ended by signal 9 \(SIGKILL\).* no memory"),
    ("SIGBUS", ExitCode.STORAGE, r"loader worker 0 \(process {pid}\) was ended by signal 7 \(SIGBUS\).* file system"),
    ("exit", ExitCode.INTERNAL, r"loader worker 0 \(process {pid}\) ended with exit code 3"),
])  # fmt: skip
def test_a_lost_worker_is_named(how, code, told):
    workers = Workers(Ends(how), 1, 1)
    pid = int(next(workers)[0]["pid"])
    for _ in range(2):  # nobody waits for ever who asks again
        with pytest.raises(WorkerLost, match=told.format(pid=pid)) as raised:
            next(workers)
        assert raised.value.exit_code == code
    workers.close()


def test_errors_keep_their_kind():
    workers = Workers(Ends("damage"), 1, 4)
    next(workers)
    with pytest.raises(DataError, match="document 7 is damaged"):
        next(workers)
    workers.close()
    workers = Workers(Ends("defect"), 1, 4)
    next(workers)
    with pytest.raises(RuntimeError, match="in loader worker 0:(.|\n)*KeyError: 'no such field'"):
        next(workers)
    workers.close()


class GoOn(logging.Handler):
    """Lets the process that a warning names go on."""

    def emit(self, record):
        os.kill(int(re.search(r"kill -CONT (\d+)", record.getMessage())[1]), signal.SIGCONT)


def test_the_wait_for_a_stopped_worker_is_told(caplog):
    """The warning names the worker, its state and what to do; once that is done the run goes on by itself."""
    workers = Workers(Large(), 1, 1, patience_seconds=0.2)
    pid = int(next(workers)[0]["pid"])
    caplog.clear()  # of what may have been told of a slow start
    os.kill(pid, signal.SIGSTOP)
    logger, go_on = logging.getLogger("data_pipeline.workers"), GoOn()
    logger.addHandler(go_on)
    try:
        for _ in range(4):
            next(workers)
    finally:
        logger.removeHandler(go_on)
    assert f"batch of loader worker 0 (process {pid}), which is stopped by a signal" in caplog.records[0].getMessage()
    workers.close()


@pytest.mark.parametrize("how", ["close", "forget"])
def test_workers_end_with_their_object(how):
    """Those too that are stopped or busy, which no polite request reaches."""
    workers = Workers(Large(busy=True), 2, 1)
    pids = [int(next(workers)[0]["pid"]) for _ in range(2)]
    os.kill(pids[0], signal.SIGSTOP)
    if how == "close":
        workers.close()
    del workers
    gc.collect()
    assert not any(map(is_alive, pids))


RANK = """
import os, signal, sys, time
from data_pipeline.workers import Workers
from tests.unit.data_pipeline.test_workers import Large

if __name__ == "__main__":
    how = sys.argv[1]
    workers = Workers(Large(busy=how == "busy"), 2, 1)
    print(*[int(next(workers)[0]["pid"]) for _ in range(2)], flush=True)
    if how == "forked" and not os.fork():  # holds the pipes that its parent had
        print(os.getpid(), flush=True)
        time.sleep(600)
    if how == "fail":
        raise ValueError("the rank failed")
    if how == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(600)
"""


@pytest.mark.parametrize("how", ["killed", "fail", *(pytest.param(how, marks=pytest.mark.slow) for how in (
    "busy", "stopped", "terminated", "forked"))])
def test_workers_end_with_their_rank(how, tmp_path):
    """However it ends and whatever they do: batches that do not fit into the pipe, or a computation."""
    (tmp_path / "rank.py").write_text(RANK)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with subprocess.Popen([sys.executable, str(tmp_path / "rank.py"), how], stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL, env=environment, text=True) as rank:
        workers = list(map(int, rank.stdout.readline().split()))
        forked = int(rank.stdout.readline()) if how == "forked" else None
        if how == "terminated":
            rank.terminate()
        elif how != "fail":
            rank.kill()
        rank.wait(timeout=300)
        try:
            assert len(workers) == 2
            deadline = time.monotonic() + 120  # an idle machine takes less than a second
            while any(map(is_alive, workers)) and time.monotonic() < deadline:
                time.sleep(0.05)
            assert not any(map(is_alive, workers))
        finally:
            if forked:
                os.kill(forked, signal.SIGKILL)


def is_alive(pid: int) -> bool:
    """Whether the process is there and no zombie, which only waits for its parent to notice."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
