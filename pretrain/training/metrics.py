"""The metrics of a run: the record of every step, throughput and model FLOPs utilisation."""

import json
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.files import write_aside, writing
from parallel.planner.hardware import peak_flops

if TYPE_CHECKING:
    from parallel.loss_terms import Losses

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"

Record = dict[str, Any]


class MetricsWriter:
    """Appends one JSON object per step to a file; every line reaches the kernel before `write` returns.

    Opening repairs what an earlier process left: records past `resumed_step` go, since those steps are about to be
    trained again, and so do damaged lines such as the half-written last one of a killed process. A step therefore
    never stands twice.
    """

    def __init__(self, path: Path, resumed_step: int = 0, first_step: int = 1) -> None:
        """
        Args:
            resumed_step: last step the checkpoint holds; 0 for a run that starts anew (drops every record).
            first_step: 0 for a file that also has a record from before the first step.
        """
        self._path = Path(path)
        with writing(self._path):
            self._last_step = _repair(self._path, resumed_step or -1, first_step - 1)
            self._file = open(self._path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 (open as long as the run)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record. Numbers that JSON cannot hold (NaN, infinities) are written as null.

        Raises ValueError when the record's step does not lie past the last one written, StorageError when the disk is
        full.
        """
        step = record["step"]
        if step <= self._last_step:
            raise ValueError(f"{self._path.name} already holds step {self._last_step}; step {step} cannot follow it")
        finite = {key: _finite(value) for key, value in record.items()}
        with writing(self._path):
            self._file.write(json.dumps(finite, allow_nan=False) + "\n")
            self._file.flush()
        self._last_step = step

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[Record]:
    """All records of a metrics file in order; a file that is not there has none.

    A half-written last line is left out in silence (the run may still be writing), damage elsewhere with a warning.
    """
    return [record for _, record in _records(Path(path))]


def loss_fields(name: str, losses: "Losses") -> Record:
    """`name` with the loss; of several terms also `name/<term>` with each term's own mean, without its weight.

    A term without a target in the global batch has None.
    """
    terms = losses.terms.items() if len(losses.terms) > 1 else ()
    return {name: losses.loss, **{f"{name}/{term}": mean for term, mean in terms}}


def term_names(record: Mapping[str, Any], name: str) -> list[str]:
    """The keys of a record that hold the terms of the loss `name`, in their order."""
    return [key for key in record if key.startswith(f"{name}/")]


def throughput(num_items: int, seconds: float) -> float:
    """Items (tokens or samples) per second; 0 when no time has passed."""
    return num_items / seconds if seconds > 0 else 0.0


def mfu(
    flops_per_unit: float, units_per_second: float, device_name: str, num_devices: int, *, dtype: str
) -> float | None:
    """Model FLOPs utilisation, a share of the peak (Chowdhery et al. 2022, PaLM, appendix B).

    flops_per_unit: what the model itself needs, forward and backward, without recomputation.
    units_per_second: tokens or samples, of the whole run. dtype: `bf16`, `fp16` or `fp32`.
    None where the peak of the device is not known.
    """
    peak = peak_flops(device_name, dtype)
    if peak is None:
        return None
    return flops_per_unit * units_per_second / (peak * num_devices)


def counted_in(record: Mapping[str, Any]) -> str:
    """What a record counts its progress in: `tokens`, or `samples` for families without tokens."""
    return "tokens" if "tokens" in record else "samples"


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _records(path: Path) -> Iterator[tuple[bytes, Record]]:
    """Every sound line of a metrics file, ended by a newline, with its record."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            record = _parse(line)
            if record is not None:
                yield (line if line.endswith(b"\n") else line + b"\n"), record
            elif line.endswith(b"\n"):
                logger.warning("%s line %d is damaged and left out", path, number)


def _parse(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    sound = isinstance(record, dict) and isinstance(record.get("step"), int)
    return record if sound else None


def _repair(path: Path, resumed_step: int, last_step: int) -> int:
    """Leave only sound records past last_step and up to resumed_step, each step once; returns the last step kept."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        return last_step
    with write_aside(path) as aside, open(aside, "wb") as file:
        for line, record in _records(path):
            if last_step < record["step"] <= resumed_step:
                file.write(line)
                last_step = record["step"]
        file.flush()
    return last_step
