"""GPUs and tests: hidden from all tests but those marked `gpu`, which start processes that see them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launchers.supervise.node_check import devices_here

NAME = "CUDA_VISIBLE_DEVICES"
VISIBLE = os.environ.get(NAME)  # as it was before `hide`


def hide() -> None:
    """Most tests start more ranks than a machine has GPUs, and bounds of parity are those of a CPU."""
    os.environ[NAME] = ""


def need(number: int) -> None:
    """Skips the test unless so many GPUs answer."""
    found = devices_here() or 0
    if found < number:
        pytest.skip(f"needs {number} GPU{'' if number == 1 else 's'}, {found} here")


def train_on_devices(world_size: int, config_path: Path, overrides: list[str]) -> int:
    """Exit code of `trainyard train` on so many GPUs."""
    environ = {name: text for name, text in os.environ.items() if name != NAME}
    environ |= {NAME: VISIBLE} if VISIBLE is not None else {}
    return subprocess.run([sys.executable, "-m", "pretrain", "train", str(config_path), "--nproc", str(world_size),
                           *overrides], env=environ, cwd=Path(__file__).parents[2], timeout=600, check=False).returncode
