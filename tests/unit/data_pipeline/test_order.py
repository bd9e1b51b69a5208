"""The order is a pure function of (seed, position), and covers every window of an epoch exactly once."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from data_pipeline.batch_plan import BatchPlan
from data_pipeline.order import BLOCK_TOKENS, WindowOrder, num_windows

token_counts = st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(lambda counts: sum(counts) >= 12)
sequence_lengths = st.integers(1, 11)
seeds = st.integers(0, 2**63)


def tokens_of(order: WindowOrder, position: int) -> list[tuple[int, int]]:
    """A sample as (document, place in it) pairs."""
    return [(piece.document, at) for piece in order.pieces(position) for at in range(piece.start, piece.stop)]


@given(token_counts, sequence_lengths, seeds, st.integers(0, 3))
@settings(deadline=None)
def test_each_window_of_an_epoch_is_visited_exactly_once(counts, sequence_length, seed, epoch):
    order = WindowOrder(np.cumsum(counts), sequence_length, seed)
    size = order.windows_per_epoch
    assert size == num_windows(sum(counts), sequence_length)
    located = [order.locate(position) for position in range(epoch * size, (epoch + 1) * size)]
    assert sorted(located) == [(epoch, window) for window in range(size)]


@given(token_counts, sequence_lengths, seeds, st.integers(0, 3))
@settings(deadline=None)
def test_windows_cut_the_ring_of_documents(counts, sequence_length, seed, epoch):
    """Samples are windows of one ring of whole documents, overlapping by one token: each target is learnt once."""
    order = WindowOrder(np.cumsum(counts), sequence_length, seed)
    ring = [(document, at) for document, count in enumerate(counts) for at in range(count)]
    size, targets = order.windows_per_epoch, []
    for position in range(epoch * size, (epoch + 1) * size):
        start = order.first_token(epoch) + order.locate(position)[1] * sequence_length
        found = tokens_of(order, position)
        assert found == [ring[place % len(ring)] for place in range(start, start + sequence_length + 1)]
        targets += found[1:]
    assert len(set(targets)) == len(targets) > len(ring) - 1 - sequence_length


@given(token_counts, seeds, st.integers(0, 500))
@settings(deadline=None)
def test_a_sample_depends_on_nothing_read_before(counts, seed, position):
    used = WindowOrder(np.cumsum(counts), 3, seed)
    for earlier in (0, position // 2, position + 100):
        used.pieces(earlier)
    assert used.pieces(position) == WindowOrder(np.cumsum(counts), 3, seed).pieces(position)


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


def test_the_order_is_pinned():
    """Changing it would change the data order of every run that is resumed: a new format, not a clean-up."""
    order = WindowOrder(np.array([400]), 8, 1234)
    assert [order.locate(position)[1] for position in range(8)] == [11, 38, 24, 39, 23, 1, 21, 42]
    assert [order.first_token(epoch) for epoch in range(4)] == [6, 1, 7, 3]


def test_a_large_set_is_read_from_few_places_at_a_time():
    """Of 300 blocks 100 are open at a time, but for the few windows that stand in for those that the last one lacks."""
    length = 2**14
    in_block = BLOCK_TOKENS // length
    order = WindowOrder(np.array([300 * BLOCK_TOKENS - 5 * length]), length, 7)
    assert order.windows_per_epoch == 300 * in_block - 6
    blocks = np.array([order.locate(position)[1] // in_block for position in range(order.windows_per_epoch)])
    for first in range(0, order.windows_per_epoch - 6, 100 * in_block):
        found, counts = np.unique(blocks[first : first + 100 * in_block], return_counts=True)
        assert (counts > 6).sum() <= 100
        assert counts[counts <= 6].sum() <= 6, found


def test_the_end_of_a_ring_of_a_trillion_tokens():
    """10^9 windows: no array is made, so that the cost is that of a small set."""
    order = WindowOrder(np.array([10**12]), 1000, 3)
    assert order.windows_per_epoch == 10**9 - 1
    seen = {order.locate(position) for position in (0, 1, 10**9 - 2, 10**9 - 1, 10**9, 7 * 10**11)}
    assert len(seen) == 6
    assert sum(piece.stop - piece.start for piece in order.pieces(10**9 - 2)) == 1001


def test_no_seed_keeps_the_stored_order():
    order = WindowOrder(np.cumsum([4, 4, 4]), 3, None)
    assert [order.locate(position) for position in range(4)] == [(0, 0), (0, 1), (0, 2), (1, 0)]


def test_too_few_tokens():
    with pytest.raises(UserError, match="samples of 9 tokens.*holds 8 tokens"):
        WindowOrder(np.cumsum([5, 3]), 8, 0)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [((10, 4, 0, 1), "multiple"), ((8, 2, 2, 2), "below data_ranks"), ((8, 0, 0, 1), "at least 1")],
)
def test_wrong_plans(sizes, message):
    names = ("global_batch", "micro_batch", "data_rank", "data_ranks")
    with pytest.raises(ValueError, match=message):
        BatchPlan(seed=0, **dict(zip(names, sizes, strict=True)))
