"""Requests to stop that lie as files in the run folder, which rank 0 looks for after every step (no torch)."""

from pathlib import Path

from common.files import write_file

# A person makes STOP to end the run for good, and removes it to go on.
STOP = "STOP"
# A supervisor whose launcher would answer a signal by killing ranks (deepspeed, torchrun, mpirun): save, go on later.
STOP_AND_GO_ON = "STOP.requeue"


def requested(folder: Path, attempt_token: str | None) -> str | None:
    """Name of the request that concerns this attempt, or None. One left behind by another attempt does not."""
    if (folder / STOP).exists():
        return STOP
    try:
        wanted = (folder / STOP_AND_GO_ON).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    return STOP_AND_GO_ON if wanted == attempt_token else None


def ask_to_go_on_later(folder: Path, attempt_token: str) -> None:
    """Asks the ranks of an attempt to save and end. Raises OSError."""
    write_file(folder / STOP_AND_GO_ON, attempt_token)


def forget(folder: Path, attempt_token: str) -> None:
    """Removes the request to an attempt that is over."""
    if requested(folder, attempt_token) == STOP_AND_GO_ON:
        (folder / STOP_AND_GO_ON).unlink(missing_ok=True)
