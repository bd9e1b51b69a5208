"""Learning-rate schedules as properties, and the split into parameter groups."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from pretrain.training.optim import learning_rate, parameter_groups

NAMES = ("constant", "linear", "cosine", "inverse_sqrt", "wsd")


@dataclass(frozen=True)
class Schedule:
    name: str = "cosine"
    warmup_steps: int = 0
    min_lr_ratio: float = 0.1
    decay_steps: int | None = None


@dataclass(frozen=True)
class Optimizer:
    lr: float = 3e-4


@st.composite
def runs(draw, names=NAMES):
    """A schedule whose warm-up and decay fit in its run, with the length of the run."""
    total = draw(st.integers(2, 5000))
    warmup = draw(st.integers(0, total - 1))
    name = draw(st.sampled_from(names))
    low, high = (1, total - warmup) if name == "wsd" else (warmup + 1, total)
    decay = draw(st.none() | st.integers(low, high))
    return Schedule(name, warmup, draw(st.floats(0.0, 1.0)), decay), total


def rates(schedule, total, steps=None):
    return [learning_rate(schedule, Optimizer(1.0), step, total) for step in steps or range(1, total + 1)]


@given(runs())
def test_warm_up_is_linear_and_ends_at_the_peak(run):
    schedule, total = run
    for step in range(1, schedule.warmup_steps + 1):
        assert learning_rate(schedule, Optimizer(), step, total) == pytest.approx(3e-4 * step / schedule.warmup_steps)


@given(runs())
def test_never_above_the_peak_and_after_the_warm_up_never_below_the_minimum(run):
    schedule, total = run
    curve = rates(schedule, total)
    assert max(curve) <= 1.0
    assert min(curve[schedule.warmup_steps :]) >= schedule.min_lr_ratio * (1 - 1e-12)


@given(runs())
def test_falls_or_stays_after_the_warm_up(run):
    schedule, total = run
    curve = rates(schedule, total)[max(schedule.warmup_steps - 1, 0) :]
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in zip(curve, curve[1:], strict=False))


@given(runs(("linear", "cosine", "wsd")))
def test_reaches_the_minimum_at_the_end_of_the_decay_and_stays(run):
    schedule, total = run
    end = total if schedule.name == "wsd" or schedule.decay_steps is None else schedule.decay_steps
    assert rates(schedule, total, (end, total, total + 1, 10 * total)) == pytest.approx([schedule.min_lr_ratio] * 4)


@given(runs())
def test_is_continuous(run):
    """No step changes the rate by more than the steepest slope of its shape; that rules out jumps between parts."""
    schedule, total = run
    curve = rates(schedule, total)
    if schedule.name == "wsd":
        usual = max(1, round(0.1 * total)) if schedule.decay_steps is None else schedule.decay_steps
        length = min(usual, total - schedule.warmup_steps)
    else:
        length = (schedule.decay_steps or total) - schedule.warmup_steps
    steepest = {
        "constant": 0.0,
        "linear": 1 / length,
        "cosine": 1.5708 / length,
        "inverse_sqrt": 1 - (max(schedule.warmup_steps, 1) / (max(schedule.warmup_steps, 1) + 1)) ** 0.5,
        "wsd": 1 / length,
    }[schedule.name]
    bound = max(steepest, 1 / max(schedule.warmup_steps, 1) if schedule.warmup_steps else 0.0) + 1e-9
    assert all(abs(later - earlier) <= bound for earlier, later in zip(curve, curve[1:], strict=False))


@given(runs(), st.integers(1, 5000))
def test_scales_with_the_peak(run, step):
    schedule, total = run
    assume(step <= total)
    at_one = learning_rate(schedule, Optimizer(1.0), step, total)
    assert learning_rate(schedule, Optimizer(7e-3), step, total) == pytest.approx(7e-3 * at_one)


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        (Schedule("constant"), 100, 1.0),
        (Schedule("linear", min_lr_ratio=0.0), 50, 0.5),
        (Schedule("linear", warmup_steps=20, min_lr_ratio=0.2), 60, 0.6),
        (Schedule("cosine", min_lr_ratio=0.1), 50, 0.55),
        (Schedule("cosine", warmup_steps=10, decay_steps=50, min_lr_ratio=0.0), 30, 0.5),
        (Schedule("inverse_sqrt", warmup_steps=25, min_lr_ratio=0.0), 100, 0.5),
        (Schedule("inverse_sqrt", warmup_steps=1, min_lr_ratio=0.3), 100, 0.3),
        (Schedule("wsd", min_lr_ratio=0.0), 90, 1.0),
        (Schedule("wsd", min_lr_ratio=0.0), 95, 0.5),
        (Schedule("wsd", decay_steps=40, min_lr_ratio=0.5), 80, 0.75),
    ],
)
def test_values_worked_out_by_hand(schedule, step, expected):
    assert learning_rate(schedule, Optimizer(1.0), step, 100) == pytest.approx(expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_shorter_than_its_warm_up_only_warms_up(name):
    assert rates(Schedule(name, warmup_steps=100), 3) == pytest.approx([0.01, 0.02, 0.03])


def test_refuses_step_zero_and_unknown_names():
    with pytest.raises(ValueError, match="steps count from 1"):
        learning_rate(Schedule(), Optimizer(), 0, 10)
    with pytest.raises(ValueError, match="'cosin' is not one of constant, linear"):
        learning_rate(replace(Schedule(), name="cosin"), Optimizer(), 1, 10)


def test_norms_and_biases_go_without_decay_in_the_order_given():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2, bias=False))
    decayed, plain = parameter_groups(model.named_parameters(), 0.1)
    assert [id(p) for p in decayed["params"]] == [id(model[0].weight), id(model[2].weight)]
    assert [id(p) for p in plain["params"]] == [id(model[0].bias), id(model[1].weight), id(model[1].bias)]
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    torch.optim.AdamW([decayed, plain], lr=1e-3)


def test_the_attribute_wins_over_the_number_of_dims():
    matrix, vector = torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.zeros(2))
    matrix.no_decay, vector.no_decay = True, False
    decayed, plain = parameter_groups([("matrix", matrix), ("vector", vector)], 0.1)
    assert decayed["params"] == [vector] and plain["params"][0] is matrix


def test_frozen_and_tied_parameters_and_empty_groups():
    weight, frozen = torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.zeros(2), requires_grad=False)
    groups = parameter_groups([("embedding", weight), ("head", weight), ("frozen", frozen)], 0.1)
    assert len(groups) == 1 and len(groups[0]["params"]) == 1
