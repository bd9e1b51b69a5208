"""What the person sees of a run: a banner, a live line (or plain lines), and a summary at the end."""

import datetime
import logging
import os
import statistics
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from common.wording import count, duration, short_number
from pretrain.training.hooks.curve import CURVE_FILE
from pretrain.training.hooks.hook import Hook, RunView
from pretrain.training.metrics import METRICS_FILE, counted_in, term_names
from pretrain.training.third_party_output import ThirdPartyOutput

LOG_FILE = Path("logs") / "train.log"
REFRESH_SECONDS = 0.2
# Steps that speed and time left are taken from: enough to be steady, few enough to follow a change.
RECENT_STEPS = 20


class ConsoleHook(Hook):
    """Speaks to the person on the main rank.

    On a terminal one line lives at the bottom; elsewhere (a batch job's output) a plain line comes every `log.every`
    steps. The same plain lines are kept in logs/train.log.
    """

    main_only = True

    def __init__(self, quiet: ThirdPartyOutput | None = None) -> None:
        """quiet: where the real terminal is while standard output is turned away; None for plain standard output."""
        self._quiet = quiet
        self._stream: TextIO = quiet.terminal if quiet else sys.stdout
        self._console = Console(file=self._stream, highlight=False)
        self._live: Progress | None = None
        self._task: TaskID | None = None
        self._file: logging.FileHandler | None = None
        self._recent: deque[tuple[float, float]] = deque(maxlen=RECENT_STEPS)
        self._started_seconds = time.monotonic()
        self._drawn_seconds = 0.0
        self._first: dict[str, Any] = {}
        self._last: dict[str, Any] = {}
        self._heldout: dict[str, Any] = {}
        self._checkpoint: Path | None = None

    def on_start(self, run: RunView) -> None:
        self._started_seconds = time.monotonic()
        log_path = run.folder / LOG_FILE
        log_path.parent.mkdir(parents=True, exist_ok=True)
        self._file = logging.FileHandler(log_path, encoding="utf-8")
        self._say(Text(f"Trainyard · {run.config.model.family} · {run.config.objective.name}", "bold"))
        for name, fact in banner(run):
            self._say(Text.assemble((f"  {name:<11}", "dim"), fact))
        if self._quiet:
            self._quiet.show_through(self._warn)
        if self._console.is_terminal:
            self._live = _progress(self._console)
            self._task = self._live.add_task("", total=run.total_steps, completed=run.start_step, facts="starting")
            self._live.start()

    def on_step_end(self, run: RunView, record: dict[str, Any]) -> None:
        self._last = record
        self._first = self._first or record
        self._recent.append((record["step_seconds"], record.get(f"{counted_in(record)}_per_second") or 0.0))
        due = record["step"] % run.config.log.every == 0 or record["step"] in (1, run.total_steps)
        if due:
            line = f"step {record['step']}/{run.total_steps}  " + "  ".join(self._facts(run, record, in_full=True))
            self._say(Text(_stamped(line)), to_console=self._live is None)
        if self._live is not None and self._task is not None:
            self._draw(self._live, self._task, record["step"], self._facts(run, record),
                       force=record["step"] == run.total_steps)

    def on_evaluation(self, run: RunView, record: dict[str, Any]) -> None:
        self._heldout = record
        told = _with_terms(f"held-out loss {record['heldout_loss']:.4f}", record, "heldout_loss")
        if num_unusable := record.get("data/unusable"):
            num_samples = record["data/samples"]
            told += (f"  without {num_unusable:,} of {num_samples:,} samples that cannot be used "
                     f"({num_unusable / num_samples:.1%})")
        self._say(Text(_stamped(f"step {record['step']}/{run.total_steps}  {told}")))

    def on_checkpoint(self, run: RunView, path: Path, step: int) -> None:
        self._checkpoint = Path(path)
        self._say(Text(_stamped(f"step {step}/{run.total_steps}  checkpoint {_shown(run.folder, path)}")))

    def on_end(self, run: RunView, reason: str) -> None:
        if self._live:
            self._live.stop()
            self._live = None
        if self._file is None:  # the run ended before it began; what went wrong is told elsewhere
            return
        for line in self._summary(run, reason):
            self._say(line)
        self._file.close()
        if self._quiet:
            self._quiet.show_through(None)

    def _facts(self, run: RunView, record: dict[str, Any], in_full: bool = False) -> list[str]:
        """The words of one line: loss, speed, utilisation, time left; in full also its terms, gradient norm and
        learning rate.

        The live line has to fit into 80 columns.
        """
        facts = [_with_terms(f"loss {record['loss']:.4f}", record, "loss") if in_full else f"loss {record['loss']:.4f}"]
        if in_full and record.get("grad_norm") is not None:
            facts.append(f"grad norm {record['grad_norm']:.3f}")
        if in_full:
            facts.append(f"lr {record['lr']:.2e}")
        facts.append(f"{statistics.median(rate for _, rate in self._recent):,.0f} {counted_in(record)}/s")
        if record.get("mfu") is not None:
            facts.append(f"MFU {record['mfu']:.1%}")
        if record.get("skipped"):
            facts.append("skipped: gradients overflowed")
        remaining = run.total_steps - record["step"]
        if remaining:
            facts.append(f"{duration(remaining * statistics.median(s for s, _ in self._recent))} left")
        return facts

    def _draw(self, live: Progress, task: TaskID, step: int, facts: list[str], *, force: bool) -> None:
        # Drawn from here and not by a thread of rich: a process with threads is not safe to fork data workers from.
        now = time.monotonic()
        if not force and now - self._drawn_seconds < REFRESH_SECONDS:
            return
        self._drawn_seconds = now
        if self._stream.isatty():
            # rich asks descriptors 0 to 2 for the size, and 1 and 2 may be turned to a file. A container's terminal
            # may say it has no columns at all; rich's own answer stands then.
            size = os.get_terminal_size(self._stream.fileno())
            if size.columns and size.lines:
                self._console.size = size
        live.update(task, completed=step, facts="  ".join(facts))
        live.refresh()

    def _summary(self, run: RunView, reason: str) -> list[Text]:
        elapsed = duration(time.monotonic() - self._started_seconds)
        step = self._last.get("step", run.start_step)
        if reason == "done":
            head = Text(f"Done: {run.total_steps:,} steps, {elapsed}", "bold green")
        else:
            head = Text(f"Stopped at step {step:,} of {run.total_steps:,} after {elapsed}: {reason}", "bold yellow")
        facts = []
        if self._last:
            facts.append(("loss", _with_terms(f"{self._first['loss']:.4f} -> {self._last['loss']:.4f}", self._last,
                                              "loss")))
        if self._heldout:
            facts.append(("held-out", _with_terms(f"{self._heldout['heldout_loss']:.4f}", self._heldout,
                                                  "heldout_loss")))
        if self._last.get("data/unusable"):
            facts.append(("passed over", f"{self._last['data/unusable']:,} samples that could not be used, the first "
                          f"named in {run.folder / 'logs'}"))
        facts.append(("run folder", str(run.folder)))
        for name, path in (("metrics", run.folder / METRICS_FILE), ("curve", run.folder / CURVE_FILE)):
            if path.exists():
                facts.append((name, str(path)))
        facts.append(("checkpoint", str(self._checkpoint) if self._checkpoint else "none written by this process"))
        return [head, *(Text.assemble((f"  {name:<11}", "dim"), fact) for name, fact in facts)]

    def _warn(self, text: str) -> None:
        self._say(Text(text, "yellow"))

    def _say(self, text: Text, to_console: bool = True) -> None:
        """One line for the log file and, unless said otherwise, for the person."""
        if to_console:
            self._console.print(text, soft_wrap=True)
        if self._file and self._file.stream:
            self._file.stream.write(text.plain + "\n")
            self._file.flush()


def banner(run: RunView) -> list[tuple[str, str]]:
    """The facts a run starts with, as (name, fact)."""
    config, layout = run.config, run.layout
    parallel = config.parallel
    words = [layout.words]
    if layout.sequence:
        words.append("sequence parallel")
    words.append(f"ZeRO {parallel.zero_stage}")
    if parallel.offload != "none":
        words.append(f"{parallel.offload} in host memory" + (" and files" if parallel.offload_folder else ""))
    if parallel.recompute != "none":
        every = f" every {parallel.recompute_every} blocks" if parallel.recompute_every > 1 else ""
        words.append(f"recompute {parallel.recompute}{every}")
    words.append(count(run.world_size, "rank"))
    accumulation = parallel.global_batch // (parallel.micro_batch * layout.data)
    batch = f"{parallel.global_batch} samples, micro-batches of {parallel.micro_batch}"
    if run.tokens_per_step != parallel.global_batch:
        batch = f"{run.tokens_per_step:,} tokens: {batch}"
    if accumulation > 1:
        batch += f", {accumulation} accumulated"
    parameters = f"{short_number(run.num_parameters)} ({run.num_parameters:,})"
    if run.num_active_parameters < run.num_parameters:
        parameters += f", {short_number(run.num_active_parameters)} met by a token"
    facts = [
        ("parameters", parameters),
        ("each step", batch),
        ("layout", ", ".join(words)),
        ("precision", config.precision.compute),
        ("device", run.device_name),
        ("run folder", str(run.folder)),
    ]
    if run.start_step:
        facts.append(("resumes", f"after step {run.start_step:,} of {run.total_steps:,}"))
    else:
        facts.append(("steps", f"{run.total_steps:,}"))
    return facts


def _with_terms(told: str, record: dict[str, Any], name: str) -> str:
    """`told`, and behind it each term of the loss `name` where it has several; `-` for one without a target."""
    terms = [f"{key.removeprefix(f'{name}/')} {'-' if record[key] is None else f'{record[key]:.4f}'}"
             for key in term_names(record, name)]
    return f"{told} ({', '.join(terms)})" if terms else told


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
        BarColumn(bar_width=16),
        TextColumn("{task.fields[facts]}"),
        console=console,
        auto_refresh=False,
        redirect_stdout=False,
        redirect_stderr=False,
    )


def _stamped(line: str) -> str:
    return f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S}  {line}"


def _shown(folder: Path, path: Path) -> str:
    """A path as seen from the run folder, when it lies in it."""
    return str(Path(path).relative_to(folder)) if Path(path).is_relative_to(folder) else str(path)
