"""Draws curve.png: training and held-out loss against tokens, with the learning rate below."""

import itertools
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.files import write_aside
from pretrain.training.hooks.hook import Hook, RunView
from pretrain.training.metrics import EVALUATIONS_FILE, METRICS_FILE, Record, counted_in, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

logger = logging.getLogger(__name__)

CURVE_FILE = "curve.png"
# A drawing takes about a second, so a run that evaluates every few seconds does not draw at every evaluation.
REDRAW_SECONDS = 30.0
# More points than the picture has pixels cost time and show nothing.
MAX_POINTS = 4000
# The smoothed line averages over this share of the run.
SMOOTHING_SHARE = 0.04

BLUE, ORANGE, GREY, INK = "#1f5fa8", "#d9661f", "#7d8590", "#24292f"


class CurveHook(Hook):
    """Redraws the curve after evaluations and at the end. A failure to draw never stops a run: it warns once."""

    main_only = True

    def __init__(self) -> None:
        self._drawn_seconds: float | None = None
        self._has_warned = False

    def on_evaluation(self, run: RunView, record: dict[str, Any]) -> None:
        now = time.monotonic()
        if self._drawn_seconds is None or now - self._drawn_seconds >= REDRAW_SECONDS:
            self._draw(run)
            self._drawn_seconds = now

    def on_end(self, run: RunView, reason: str) -> None:
        self._draw(run)

    def _draw(self, run: RunView) -> None:
        try:
            draw_curve(run.folder)
        except Exception as failure:
            if not self._has_warned:
                logger.warning("%s could not be drawn, training is not affected: %s", CURVE_FILE, failure)
                self._has_warned = True


def draw_curve(folder: Path) -> Path | None:
    """Draw curve.png of a run folder from its metrics; None when there is no step yet."""
    # Imported here: matplotlib takes a second. The Figure class is used without pyplot, which holds global state and
    # looks for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    folder = Path(folder)
    steps = _with(folder / METRICS_FILE, "loss")
    if not steps:
        return None
    evaluations = _with(folder / EVALUATIONS_FILE, "heldout_loss")
    unit = counted_in(steps[0])
    figure = Figure(figsize=(9, 6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    loss_axes, lr_axes = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    _draw_losses(loss_axes, steps, evaluations, unit)
    _draw_learning_rate(lr_axes, steps, unit)
    figure.suptitle(_title(folder, steps, evaluations), fontsize=11, color=INK)
    with write_aside(folder / CURVE_FILE) as aside:
        figure.savefig(aside, format="png")
    return folder / CURVE_FILE


def smoothed(values: list[float], window: int) -> list[float]:
    """Centred moving average over `window` values, which unlike an exponential one does not lag behind a steep fall.

    At the beginning, where losses fall fast, the window shrinks on both sides alike; at the end, on the far side only.
    """
    sums = [0.0, *itertools.accumulate(values)]
    half = window // 2
    result = []
    for index in range(len(values)):
        reach = min(index, half)
        start, end = index - reach, min(index + reach + 1, len(values))
        result.append((sums[end] - sums[start]) / (end - start))
    return result


def _with(path: Path, key: str) -> list[Record]:
    """Records that hold a number under key (a loss that was no number is null)."""
    return [record for record in read_metrics(path) if record.get(key) is not None]


def _draw_losses(axes: "Axes", steps: list[Record], evaluations: list[Record], unit: str) -> None:
    counts, losses = [record[unit] for record in steps], [record["loss"] for record in steps]
    window = round(SMOOTHING_SHARE * len(steps))
    stride = max(1, len(steps) // MAX_POINTS)
    if window >= 3:
        raw, smooth = losses[::stride], smoothed(losses, window)[::stride]
        axes.plot(counts[::stride], raw, color=BLUE, alpha=0.25, linewidth=0.8, label="training, each step")
        axes.plot(counts[::stride], smooth, color=BLUE, linewidth=1.8, label="training, smoothed")
    else:
        axes.plot(counts, losses, color=BLUE, linewidth=1.5, label="training")
    if evaluations:
        heldout = [record["heldout_loss"] for record in evaluations]
        marker = "o" if len(evaluations) <= 60 else ""
        axes.plot(
            [record[unit] for record in evaluations], heldout,
            color=ORANGE, linewidth=1.5, marker=marker, markersize=4, label="held-out",
        )  # fmt: skip
    axes.set_ylabel("loss (nats per token)" if unit == "tokens" else "loss")
    axes.legend(frameon=False, labelcolor=INK)
    _style(axes)


def _draw_learning_rate(axes: "Axes", steps: list[Record], unit: str) -> None:
    stride = max(1, len(steps) // MAX_POINTS)
    kept = steps[::stride]
    axes.plot([record[unit] for record in kept], [record["lr"] for record in kept], color=GREY, linewidth=1.5)
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axes.set_ylabel("learning rate")
    axes.set_xlabel(unit)
    _style(axes)


def _style(axes: "Axes") -> None:
    from matplotlib.ticker import FuncFormatter

    axes.grid(color="#d8dee4", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.margins(x=0.01)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=INK, labelsize=9)
    axes.xaxis.set_major_formatter(FuncFormatter(_count_label))


def _count_label(count: float, _position: int | None = None) -> str:
    """`0`, `500`, `12.5k`, `3M`, `1.2B`, `300T`: how an axis of tokens is read."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(count) >= size:
            return f"{count / size:g}{unit}"
    return f"{count:g}"


def _title(folder: Path, steps: list[Record], evaluations: list[Record]) -> str:
    last = steps[-1]
    title = f"{folder.resolve().name} · step {last['step']:,} · training loss {last['loss']:.3f}"
    return f"{title} · held-out {evaluations[-1]['heldout_loss']:.3f}" if evaluations else title
