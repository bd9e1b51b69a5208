"""The checkpoints at a path: of a run folder, of its `checkpoints` folder, or of one step (no torch)."""

from __future__ import annotations

from pathlib import Path

from common.errors import UserError
from pretrain.checkpoint.manifest import PREFIX

CHECKPOINTS = "checkpoints"


def checkpoints_at(path: Path) -> list[Path]:
    """The folders of the checkpoints at a path, newest first; whether they are whole is another question.

    Args:
        path: a run folder, its `checkpoints` folder, or the folder of one step.
    """
    folder = path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path
    if not folder.is_dir():
        return []
    if folder is path and _step(path) is not None:
        return [path]
    steps = {found: step for found in folder.iterdir() if (step := _step(found)) is not None}
    return sorted(steps, key=steps.__getitem__, reverse=True)


def require_checkpoints(path: Path) -> list[Path]:
    """The same. Raises UserError when there is none."""
    found = checkpoints_at(path)
    if not found:
        what = "no checkpoint here" if path.exists() else "no such folder"
        raise UserError(f"{path}: {what}. Give a run folder, or one of its {CHECKPOINTS}/{PREFIX}NNNNNNNN")
    return found


def _step(folder: Path) -> int | None:
    """The step in a checkpoint's name; None for another name."""
    digits = folder.name.removeprefix(PREFIX)
    return int(digits) if digits != folder.name and digits.isdecimal() else None
