"""What a rank sees of code, libraries, files and machine, and in what it differs from the others."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from parallel.ranks.rank_info import RankInfo
from pretrain.checkpoint.manifest import package_versions
from pretrain.config.run_config import RunConfig
from pretrain.training.resume import dataset_fingerprint

ROOMS = ("data_pipeline", "launchers", "parallel", "pretrain")
SHORT = 12  # characters of a hash that is shown
MAX_SKEW_SECONDS = 5.0  # a lock or a heartbeat looks stale after minutes
LEAST_SHARE = 0.8  # of the free device memory that most ranks have
SEEN_SECONDS = 10.0  # a network file system may show a new file late


class Finding(NamedTuple):
    """Something wrong with one rank."""

    rank: int
    node: str
    text: str


def report_of_rank(info: RankInfo, config: RunConfig | None, config_problem: str | None, device: torch.device, *,
                   device_name: str, node_problems: Sequence[str]) -> dict[str, Any]:
    """Plain values. Those under `same` have to be the same on every rank."""
    same = {f"code of {room}": _short(code_hash(room)) for room in ROOMS}
    same |= package_versions() | {"device": device_name}
    same["config"] = config_problem or "none"
    if config:
        same["config"] = _short(hashlib.sha256(config.text().encode()).hexdigest())
        for key in ("train", "heldout"):
            folder = getattr(config.data, key)
            same[f"data.{key}"] = "none" if folder is None else _fingerprint(folder)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    return {"rank": info.rank, "node": info.node, "same": same, "problems": list(node_problems),
            "free_device_bytes": free, "free_host_bytes": free_host_bytes(),
            "free_disk_bytes": _free_disk_bytes(Path(config.run.dir)) if config else None}


def code_hash(room: str) -> str:
    """SHA-256 over the names and contents of a room's Python files."""
    found = hashlib.sha256()
    root = Path(__file__).resolve().parents[2] / room
    for path in sorted(root.rglob("*.py")):
        content = path.read_bytes()
        found.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode())
        found.update(content)
    return found.hexdigest()


def free_host_bytes() -> int | None:
    """Memory that this machine could still give, None where the kernel does not say."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def differing(reports: Sequence[dict[str, Any]]) -> list[Finding]:
    """Who sees something other than most ranks do; between two equal camps rank 0's side counts as the usual one."""
    found = []
    for name in reports[0]["same"]:
        values = [rank["same"].get(name, "nothing") for rank in reports]
        usual = _usual(values)
        found += [Finding(rank["rank"], rank["node"], f"{name} is {value}, while {_holders(values, usual)} {usual}")
                  for rank, value in zip(reports, values, strict=True) if value != usual]
    found += [Finding(rank["rank"], rank["node"], text) for rank in reports for text in rank["problems"]]
    return found + _short_of_memory(reports)


def breaks_groups(reports: Sequence[dict[str, Any]]) -> bool:
    """Whether ranks could not even build the same groups, for they differ in config or in the code of the layout."""
    return any(len({rank["same"][name] for rank in reports}) > 1
               for name in ("config", "code of parallel", "code of pretrain"))


def skewed(reports: Sequence[dict[str, Any]], offsets_seconds: Sequence[float]) -> list[Finding]:
    """Whose clock is far from rank 0's."""
    return [Finding(rank["rank"], rank["node"], f"its clock differs from rank 0's by {offset:+.1f} s (most allowed: "
                    f"{MAX_SKEW_SECONDS:.0f} s); set the clocks of the nodes with NTP or chrony")
            for rank, offset in zip(reports, offsets_seconds, strict=True) if abs(offset) > MAX_SKEW_SECONDS]


class SharedToken:
    """A file that rank 0 leaves in the run folder, and that every rank has to find there."""

    def __init__(self, folder: Path, token: str, is_main: bool):
        self._folder, self._is_main = folder, is_main
        self._path = self._folder / f".selfcheck-{token}"
        self._made: list[Path] = []

    def __enter__(self) -> SharedToken:
        if self._is_main:
            self._made = [place for place in (self._folder, *self._folder.parents) if not place.exists()]
            with contextlib.suppress(OSError):  # then nobody finds it, and that is told
                self._folder.mkdir(parents=True, exist_ok=True)
                self._path.touch()
        return self

    def problem(self) -> str | None:
        """What this rank has to say, after waiting for a slow file system."""
        deadline = time.monotonic() + SEEN_SECONDS
        while not self._path.exists():
            if time.monotonic() > deadline:
                return (f"it does not see the file that rank 0 wrote to {self._folder.resolve()}; run.dir must lie on "
                        "a file system that all nodes share")
            time.sleep(0.1)
            with contextlib.suppress(OSError):
                os.listdir(self._folder)  # makes a network file system look again
        return None

    def __exit__(self, *_: object) -> None:
        if self._is_main:
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)
                for folder in self._made:  # nothing is left of a check
                    folder.rmdir()


def _usual(values: Sequence[str]) -> str:
    counts = Counter(values)
    most = max(counts.values())
    return values[0] if counts[values[0]] == most else next(value for value in values if counts[value] == most)


def _holders(values: Sequence[str], usual: str) -> str:
    count = sum(value == usual for value in values)
    return f"rank {values.index(usual)} has" if count == 1 else f"{count} ranks have"


def _short_of_memory(reports: Sequence[dict[str, Any]]) -> list[Finding]:
    known = sorted(rank["free_device_bytes"] for rank in reports if rank["free_device_bytes"] is not None)
    if not known:
        return []
    middle = known[len(known) // 2]
    return [Finding(rank["rank"], rank["node"], f"{rank['free_device_bytes'] / 2**30:.1f} GiB are free on its device, "
                    f"{middle / 2**30:.1f} GiB on most: another process holds memory there")
            for rank in reports if (rank["free_device_bytes"] or middle) < LEAST_SHARE * middle]


def _fingerprint(folder: str) -> str:
    try:
        return _short(dataset_fingerprint(folder))
    except OSError as error:
        return f"unreadable ({error.strerror}: {folder})"


def _free_disk_bytes(folder: Path) -> int | None:
    existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    with contextlib.suppress(OSError):
        return shutil.disk_usage(existing).free
    return None


def _short(digest: str) -> str:
    return digest[:SHORT]
