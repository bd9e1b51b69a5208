"""Whether this node can train, checked before the first step: run folder, disk, devices, Python packages.

``python -m launchers.supervise.node_check RUN_FOLDER DEVICES``, one task a node. Exit code 71 when
something is wrong, with a note on standard output that names the node: the run folder may be just what cannot be
written.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from common.errors import ExitCode, RankInfoError
from launchers.run_folder.notes import NOTES_FOLDER, note_of_node
from parallel.ranks.rank_info import alone, read_rank_info

FREE_BYTES = 1 << 30


def main(argv: Sequence[str]) -> int:
    """Returns 0, or 71 after naming what is wrong with this node."""
    folder, devices = Path(argv[0]), int(argv[1])
    try:
        info = read_rank_info() or alone()
    except RankInfoError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    found = problems(folder, devices)
    if not found:
        return 0
    reason = f"node {info.node} cannot train: {'; '.join(found)}"
    sys.stdout.write(json.dumps(asdict(note_of_node(info, info.node, reason))) + "\n")
    return ExitCode.NODE


def problems(folder: Path | None, devices: int) -> list[str]:
    """What is wrong with this node for a run in ``folder`` (None: not looked at) with so many devices (0: none)."""
    found = _folder_problems(folder) if folder else []
    found += [f"the package {name} is missing" for name in ("torch", "deepspeed", "megatron.core")
              if not _is_there(name)]
    if devices:
        seen = devices_here()
        if seen is not None and seen < devices:
            found.append(f"{seen} devices answer, {devices} are needed")
    return found


def _folder_problems(folder: Path) -> list[str]:
    found = []
    probe = folder / NOTES_FOLDER / f".probe-{uuid.uuid4().hex}"
    try:
        probe.write_bytes(os.urandom(4096))
        probe.unlink()
        if shutil.disk_usage(folder).free < FREE_BYTES:
            found.append(f"less than 1 GiB is free in {folder}")
    except OSError as error:
        found.append(f"{folder} cannot be written: {error.strerror}")
    return found


def _is_there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def devices_here() -> int | None:
    """How many GPUs answer; None when this machine has no tool to ask."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    try:
        done = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        return 0
    return sum(line.startswith("GPU ") for line in done.stdout.splitlines())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
