"""Opening the checkpoint that a path means: the newest whole one of a run folder, or one step."""

from __future__ import annotations

from pathlib import Path

from common.errors import UserError
from pretrain.checkpoint.locate import require_checkpoints
from pretrain.checkpoint.reader import Checkpoint
from pretrain.checkpoint.store import newest_whole


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at a run folder (its newest whole one), at its `checkpoints` folder, or at one step's folder.

    The ranks of the default group call it together, because rank 0 chooses the newest whole one for all.

    Raises:
        UserError: there is none.
        CheckpointError: it is damaged.
    """
    require_checkpoints(path)
    checkpoint, _ = newest_whole(path)
    if checkpoint is None:
        raise UserError(f"{path}: the checkpoint that was here is gone")
    return checkpoint
