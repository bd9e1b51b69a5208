"""Learning-rate schedules and optimizer parameter groups.

The learning rate is a pure function of the step, so a resumed run needs no schedule state and a test no optimizer.
"""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch.nn import Parameter

# Share of the run that the final decay of `wsd` takes when nothing is said: Hu et al. 2024, section 4.3, find a tenth
# of the tokens enough.
WSD_DECAY_SHARE = 0.1


class ScheduleSettings(Protocol):
    """The `schedule` section of a config."""

    @property
    def name(self) -> str: ...

    warmup_steps: int
    min_lr_ratio: float
    decay_steps: int | None


class PeakSettings(Protocol):
    """What a schedule reads of the `optimizer` section."""

    lr: float


def learning_rate(schedule: ScheduleSettings, optimizer: PeakSettings, step: int, total_steps: int) -> float:
    """Learning rate of one step: `optimizer.lr` times a factor in (0, 1].

    With s the step, W `warmup_steps`, S `total_steps`, D `decay_steps` and m `min_lr_ratio`, every schedule first
    warms up linearly, factor s / W for s <= W, so that step W is the first at the peak. After that:

    constant: 1.
    linear: 1 - (1 - m) p, where p = (s - W) / (D - W), and m from step D on. D is S unless said otherwise.
    cosine: m + (1 - m) (1 + cos(pi p)) / 2, p as above (Loshchilov & Hutter 2017, SGDR, eq. 5, one cycle).
    inverse_sqrt: max(m, sqrt(W / s)), with W at least 1 (Vaswani et al. 2017, eq. 3, scaled to peak at 1).
    wsd: 1 until step S - D, then linearly down to m at step S (Hu et al. 2024, MiniCPM, section 4.2, warm-up, stable,
        decay, with a linear decay). D is a tenth of S unless said otherwise, and never reaches into the warm-up.

    step: 1-based. A step past total_steps keeps the last value of linear, cosine and wsd.
    Raises ValueError for a step below 1 or an unknown name.
    """
    if step < 1:
        raise ValueError(f"learning_rate was asked for step {step}; steps count from 1")
    if schedule.name not in _FACTORS:
        raise ValueError(f"schedule {schedule.name!r} is not one of {', '.join(_FACTORS)}")
    if step <= schedule.warmup_steps:
        return optimizer.lr * step / schedule.warmup_steps
    return optimizer.lr * _FACTORS[schedule.name](schedule, step, total_steps)


def _constant(schedule: ScheduleSettings, step: int, total_steps: int) -> float:
    return 1.0


def _linear(schedule: ScheduleSettings, step: int, total_steps: int) -> float:
    return _down(schedule, 1.0 - _progress(schedule, step, total_steps))


def _cosine(schedule: ScheduleSettings, step: int, total_steps: int) -> float:
    return _down(schedule, 0.5 * (1.0 + math.cos(math.pi * _progress(schedule, step, total_steps))))


def _inverse_sqrt(schedule: ScheduleSettings, step: int, total_steps: int) -> float:
    return max(schedule.min_lr_ratio, math.sqrt(max(schedule.warmup_steps, 1) / step))


def _wsd(schedule: ScheduleSettings, step: int, total_steps: int) -> float:
    decay_steps = schedule.decay_steps
    if decay_steps is None:
        decay_steps = max(1, round(WSD_DECAY_SHARE * total_steps))
    start = max(total_steps - decay_steps, schedule.warmup_steps)
    return _down(schedule, 1.0 - _share(step, start, total_steps))


_FACTORS = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "inverse_sqrt": _inverse_sqrt,
    "wsd": _wsd,
}


def _progress(schedule: ScheduleSettings, step: int, total_steps: int) -> float:
    """How far a step stands between the end of the warm-up (0) and the end of the decay (1)."""
    end = total_steps if schedule.decay_steps is None else schedule.decay_steps
    return _share(step, schedule.warmup_steps, end)


def _share(step: int, start: int, end: int) -> float:
    """Position of step on the way from start to end, held within 0 and 1."""
    if step >= end:
        return 1.0
    return max(0.0, (step - start) / (end - start))


def _down(schedule: ScheduleSettings, height: float) -> float:
    """Map a height in 0..1 onto min_lr_ratio..1."""
    return schedule.min_lr_ratio + (1.0 - schedule.min_lr_ratio) * height


def parameter_groups(named_parameters: Iterable[tuple[str, "Parameter"]], weight_decay: float) -> list[dict[str, Any]]:
    """Split parameters into a group with weight decay and one without.

    A parameter says by its attribute `no_decay` whether it goes without; one that says nothing goes without when it
    has fewer than two dims (norm weights, biases). Frozen parameters are left out, a tied one stands once, and each
    group keeps the order given, so every rank and every run builds the same groups. A group that would be empty
    (a pipeline stage without norms) is left out, since DeepSpeed cannot flatten one.
    """
    decayed: list[Parameter] = []
    plain: list[Parameter] = []
    seen: set[int] = set()
    for _, parameter in named_parameters:
        if not parameter.requires_grad or id(parameter) in seen:
            continue
        seen.add(id(parameter))
        (plain if _goes_without_decay(parameter) else decayed).append(parameter)
    groups = ({"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]


def _goes_without_decay(parameter: "Parameter") -> bool:
    said = getattr(parameter, "no_decay", None)
    if said is not None:
        return bool(said)
    # ZeRO-3 flattens what it partitions and keeps the true shape in ds_shape.
    return len(getattr(parameter, "ds_shape", parameter.shape)) < 2
