"""The order is a pure function of (seed, position), and covers every window of an epoch exactly once."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from data_pipeline.batch_plan import BatchPlan
from data_pipeline.order import WindowOrder, num_windows, permutation

token_counts = st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(lambda counts: sum(counts) >= 12)
sequence_lengths = st.integers(1, 11)
seeds = st.integers(0, 2**63)


def tokens_of(order: WindowOrder, position: int) -> list[tuple[int, int]]:
    """A sample as (document, place in it) pairs."""
    return [(piece.document, at) for piece in order.pieces(position) for at in range(piece.start, piece.stop)]


@given(token_counts, sequence_lengths, seeds, st.integers(0, 3))
@settings(deadline=None)
def test_each_window_of_an_epoch_is_visited_exactly_once(counts, sequence_length, seed, epoch):
    order = WindowOrder(np.array(counts), sequence_length, seed)
    size = order.windows_per_epoch
    assert size == num_windows(sum(counts), sequence_length)
    located = [order.locate(position) for position in range(epoch * size, (epoch + 1) * size)]
    assert sorted(located) == [(epoch, window) for window in range(size)]


@given(token_counts, sequence_lengths, seeds)
@settings(deadline=None)
def test_windows_cut_the_shuffled_stream(counts, sequence_length, seed):
    """Samples are windows of one stream of whole documents, overlapping by one token: each target is learnt once."""
    order = WindowOrder(np.array(counts), sequence_length, seed)
    documents = permutation(len(counts), seed, 0, "documents").tolist()
    stream = [(document, at) for document in documents for at in range(counts[document])]
    for position in range(order.windows_per_epoch):
        start = order.locate(position)[1] * sequence_length
        assert tokens_of(order, position) == stream[start : start + sequence_length + 1]


@given(token_counts, seeds, st.integers(0, 500))
@settings(deadline=None)
def test_a_sample_depends_on_nothing_read_before(counts, seed, position):
    used = WindowOrder(np.array(counts), 3, seed)
    for earlier in (0, position // 2, position + 100):
        used.pieces(earlier)
    assert used.pieces(position) == WindowOrder(np.array(counts), 3, seed).pieces(position)


@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 4), st.integers(0, 50), st.integers(1, 5))
def test_data_ranks_together_take_the_global_order(accumulation, micro_batch, data_ranks, start, num_steps):
    global_batch = accumulation * micro_batch * data_ranks
    plans = [BatchPlan(seed=None, global_batch=global_batch, micro_batch=micro_batch, data_rank=rank,
                       data_ranks=data_ranks, first_position=start) for rank in range(data_ranks)]
    taken = [
        position
        for step in range(num_steps)
        for plan in plans
        for number in range(step * accumulation, (step + 1) * accumulation)
        for position in plan.positions(number)
    ]
    end = plans[0].position_after(num_steps)
    assert taken == list(range(start, end))
    assert (end - start, plans[0].num_steps(end - start)) == (num_steps * global_batch, num_steps)
    assert plans[0].num_steps(end - start + 1) == num_steps + 1


def test_epochs_and_seeds_differ():
    orders = {(seed, epoch): permutation(50, seed, epoch, "documents").tobytes() for seed in (1, 2) for epoch in (0, 1)}
    assert len(set(orders.values())) == 4
    assert permutation(50, 1, 0, "windows").tobytes() not in orders.values()


def test_the_shuffle_is_pinned():
    """Changing it would change the data order of every run that is resumed: a new format, not a clean-up."""
    assert permutation(8, 1234, 0, "documents").tolist() == [2, 6, 0, 7, 5, 4, 1, 3]


def test_no_seed_keeps_the_stored_order():
    order = WindowOrder(np.array([4, 4, 4]), 3, None)
    assert [order.locate(position) for position in range(4)] == [(0, 0), (0, 1), (0, 2), (1, 0)]


def test_too_few_tokens():
    with pytest.raises(UserError, match="samples of 9 tokens.*holds 8 tokens"):
        WindowOrder(np.array([5, 3]), 8, 0)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [((10, 4, 0, 1), "multiple"), ((8, 2, 2, 2), "below data_ranks"), ((8, 0, 0, 1), "at least 1")],
)
def test_wrong_plans(sizes, message):
    names = ("global_batch", "micro_batch", "data_rank", "data_ranks")
    with pytest.raises(ValueError, match=message):
        BatchPlan(seed=0, **dict(zip(names, sizes, strict=True)))
