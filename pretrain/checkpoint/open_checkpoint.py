"""Opening the checkpoint that a path means: the newest whole one of a run folder, or one step."""

from __future__ import annotations

from pathlib import Path

from common.errors import ExitCode, UserError
from pretrain.checkpoint.manifest import PREFIX, CheckpointError
from pretrain.checkpoint.store import Checkpoint, newest_whole


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at a run folder (its newest whole one), at its `checkpoints` folder, or at one step's folder.

    The ranks of the default group call it together, because rank 0 chooses the newest whole one for all.

    Raises:
        UserError: there is none, or it is damaged.
    """
    if not path.exists():
        raise UserError(f"{path}: no such folder. Give a run folder, or one of its checkpoints")
    try:
        if path.name.startswith(PREFIX):
            return Checkpoint(path)
        folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
        checkpoint, _ = newest_whole(folder)
    except CheckpointError as error:
        raise UserError(str(error), ExitCode.DATA) from None
    if checkpoint is None:
        raise UserError(f"{path}: no checkpoint here. Give a run folder, or one of its checkpoints/{PREFIX}NNNNNNNN")
    return checkpoint
