"""Small JSON files of a run folder: written whole, read with doubt."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.files import write_file

MAX_BYTES = 1 << 20


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes one JSON object whole, readable by owner and group. Raises OSError."""
    write_file(path, json.dumps(values, indent=1), mode=0o640)


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None when there is none that can be read."""
    try:
        if path.stat().st_size > MAX_BYTES:
            return None
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None
