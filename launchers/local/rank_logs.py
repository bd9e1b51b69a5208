"""Log files of ranks: opening them, and quoting the end of the one that failed."""

import os
import re
from pathlib import Path
from typing import BinaryIO

TAIL_BYTES = 64 * 1024
TAIL_LINES = 30
_TRACEBACK = "Traceback (most recent call last):"
# torch and torchrun put a rank in front of every line, such as [rank1]:
_PREFIX = re.compile(r"^\[(?:rank|default)\d+\]:\s?")


def open_log(folder: Path, rank: int) -> tuple[Path, BinaryIO, int]:
    """Opens the log of a rank for appending; returns its path, the file, and where this attempt begins (bytes)."""
    path = folder / f"rank-{rank}.log"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
    file = os.fdopen(descriptor, "ab", buffering=0)
    return path, file, os.fstat(descriptor).st_size


def failure_text(path: Path, start: int = 0) -> str:
    """The last traceback in a log, or its last lines when there is none. Empty when nothing was written."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(start, size - TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    lines = [_PREFIX.sub("", line) for line in lines]
    begins = [number for number, line in enumerate(lines) if line.startswith(_TRACEBACK)]
    shown = lines[begins[-1]:][:4 * TAIL_LINES] if begins else lines[-TAIL_LINES:]
    return "\n".join(shown).strip("\n")
