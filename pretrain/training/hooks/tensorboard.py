"""Scalars for TensorBoard, under tensorboard/ in the run folder."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.training.hooks.hook import Hook, RunView
from pretrain.training.metrics import term_names

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

SCALARS = ("loss", "grad_norm", "lr", "tokens_per_second", "samples_per_second", "mfu", "balance_loss", "z_loss",
           "expert_load_max", "dropped_fraction", "router_entropy")


class TensorBoardHook(Hook):
    """Writes each step's scalars; after a resume TensorBoard hides the steps that are trained again."""

    main_only = True

    def __init__(self) -> None:
        self._writer: SummaryWriter | None = None

    def on_start(self, run: RunView) -> None:
        # Imported here: it takes a second, and runs without TensorBoard should not pay for it.
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(log_dir=str(run.folder / "tensorboard"), purge_step=run.start_step + 1)

    def on_step_end(self, run: RunView, record: dict[str, Any]) -> None:
        self._add(record, (*SCALARS, *term_names(record, "loss")))

    def on_evaluation(self, run: RunView, record: dict[str, Any]) -> None:
        self._add(record, ("heldout_loss", *term_names(record, "heldout_loss")))
        self._flush()

    def _add(self, record: dict[str, Any], names: Iterable[str]) -> None:
        for name in names:
            if self._writer and record.get(name) is not None:
                self._writer.add_scalar(name, record[name], record["step"])

    def on_checkpoint(self, run: RunView, path: Path, step: int) -> None:
        self._flush()

    def _flush(self) -> None:
        if self._writer:
            self._writer.flush()

    def on_end(self, run: RunView, reason: str) -> None:
        if self._writer:
            self._writer.close()
