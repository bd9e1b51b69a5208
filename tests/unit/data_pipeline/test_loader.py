"""Steps are the same for any workers, ranks, micro-batches and any place of resumption."""

import os
import pickle
import signal
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import DataError, UserError
from data_pipeline.batch_plan import BatchPlan
from data_pipeline.loader import Loader, ReadOptions, heldout_batches
from data_pipeline.order import WindowOrder
from data_pipeline.tokens.token_dataset import TokenDataset
from tests.helpers.marks import slow_after

LENGTH = 32
SEED = 7


def rows(steps) -> torch.Tensor:
    """Samples of several steps in order, [num_samples, LENGTH + 1]."""
    return torch.cat([micro_batch["tokens"] for step in steps for micro_batch in step])


def open_loader(dataset, global_batch=4, micro_batch=2, workers=0, stages=(), **plan) -> Loader:
    plan = BatchPlan(seed=SEED, global_batch=global_batch, micro_batch=micro_batch, **plan)
    return Loader(dataset, plan, ReadOptions(LENGTH, workers=workers, stages=stages))


def take(dataset, num_steps, **options) -> torch.Tensor:
    with open_loader(dataset, **options) as loader:
        return rows([next(loader) for _ in range(num_steps)])


@pytest.fixture(scope="session")
def expected(dataset) -> torch.Tensor:
    """The first 480 samples of the run, straight from the order."""
    order = WindowOrder(dataset.document_ends, LENGTH, SEED)
    assert order.windows_per_epoch < 480, "the tests should cross an epoch"
    return torch.from_numpy(np.stack([dataset.window(order.pieces(position)) for position in range(480)]))


def test_shape_type_and_position(dataset):
    loader = open_loader(dataset, global_batch=12, data_rank=1, data_ranks=2, first_position=24)
    step = next(loader)
    assert [micro_batch["tokens"].shape for micro_batch in step] == [(2, LENGTH + 1)] * 3
    assert step[0].keys() == {"tokens"}
    assert step[0]["tokens"].dtype == torch.int64
    assert loader.position == 36
    assert loader.epoch == 36 / loader.samples_per_epoch


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 200))
@settings(max_examples=40, deadline=None)
def test_any_ranks_and_micro_batches_give_the_global_order(
    dataset, expected, data_ranks, micro_batch, accumulation, start
):
    """Resumed at any position: the ranks' blocks of each step, in rank order, are the run's samples."""
    batch = data_ranks * micro_batch * accumulation
    loaders = [open_loader(dataset, batch, micro_batch, data_rank=rank, data_ranks=data_ranks, first_position=start)
               for rank in range(data_ranks)]
    taken = rows([next(loader) for _ in range(3) for loader in loaders])
    assert torch.equal(taken, expected[start : start + 3 * batch])


@pytest.mark.parametrize("workers", slow_after(1, [2, 1]))
def test_workers_do_not_change_the_stream(dataset, expected, workers):
    options = {"global_batch": 12, "micro_batch": 2, "data_rank": 1, "data_ranks": 2, "first_position": 300}
    alone = take(dataset, 10, workers=0, **options)
    assert torch.equal(take(dataset, 10, workers=workers, **options), alone)
    assert torch.equal(alone[:6], expected[306:312])


def test_damage_reaches_the_rank_from_a_worker(copied_folder):
    """The message is the one that a rank without workers gives, at the same step."""
    for shard in copied_folder.glob("*.tar"):
        with open(shard, "r+b") as file:
            file.seek(512)
            file.write(b"\xff\xff")
    outcomes = []
    for workers in (0, 1):
        with open_loader(TokenDataset.open(copied_folder), workers=workers) as loader:
            with pytest.raises(DataError, match="do not match their checksum") as raised:
                for _ in range(loader.samples_per_epoch):
                    next(loader)
            outcomes.append((loader.position, raised.value.message))
    assert outcomes[0] == outcomes[1]


def children(parent: int) -> set[int]:
    """Processes that `parent` started."""
    with open(f"/proc/{parent}/task/{parent}/children", encoding="ascii") as file:
        return set(map(int, file.read().split()))


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="needs /proc")
def test_workers_ignore_signals_and_end_with_the_loader(dataset):
    before = children(os.getpid())
    loader = open_loader(dataset, workers=1)
    workers = children(os.getpid()) - before
    assert workers
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        for pid in workers:
            os.kill(pid, number)
    for _ in range(5):
        next(loader)
    loader.close()
    # What multiprocessing itself keeps (its resource tracker) stays until this process ends.
    wait_for_end(workers)


def wait_for_end(workers) -> None:
    deadline = time.monotonic() + 120
    while any(map(is_loader_worker, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_loader_worker, workers))


def is_loader_worker(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return b"spawn_main" in file.read()
    except OSError:
        return False


def double(source):
    """A user's stage."""
    for sample in source:
        yield sample | {"doubled": sample["tokens"] * 2}


def test_a_further_stage(dataset):
    [micro_batch] = next(open_loader(dataset, micro_batch=4, stages=[double]))
    assert torch.equal(micro_batch["doubled"], micro_batch["tokens"] * 2)


def test_dataset_pickles_as_its_folder(dataset):
    content = pickle.dumps(dataset)
    assert len(content) < 1_000
    assert np.array_equal(pickle.loads(content).tokens(3), dataset.tokens(3))


@pytest.mark.parametrize("data_ranks", [1, 2, 3])
@pytest.mark.parametrize("num_samples", [1, 7, 12, None])
def test_heldout_is_the_same_on_any_layout(dataset, data_ranks, num_samples):
    order = WindowOrder(dataset.document_ends, LENGTH, None)
    size = num_samples or order.windows_per_epoch
    expected = np.stack([dataset.window(order.pieces(position)) for position in range(size)])
    ranks = [list(heldout_batches(dataset, BatchPlan.heldout(2, rank, data_ranks), ReadOptions(LENGTH), num_samples))
             for rank in range(data_ranks)]
    assert len({len(batches) for batches in ranks}) == 1
    in_order = [batch for batches in zip(*ranks, strict=True) for batch in batches]
    tokens = torch.cat([batch["tokens"] for batch in in_order])
    weights = torch.cat([batch["weights"] for batch in in_order])
    assert torch.equal(tokens[:size], torch.from_numpy(expected))
    assert weights.shape == (len(tokens), LENGTH)
    assert weights.dtype == torch.float32
    assert torch.all(weights[:size] == 1) and torch.all(weights[size:] == 0)
    assert len(tokens) - size < 2 * data_ranks


def test_too_small_for_one_sample(dataset):
    with pytest.raises(UserError, match="larger dataset"):
        Loader(dataset, BatchPlan(seed=SEED, global_batch=1, micro_batch=1), ReadOptions(dataset.num_tokens))
    with pytest.raises(UserError, match="larger dataset"):
        next(heldout_batches(dataset, BatchPlan.heldout(1), ReadOptions(dataset.num_tokens)))
