"""What a checkpoint says about itself, and how to tell a whole one from a damaged one (no torch).

A checkpoint is a folder `step-00000100/` with one safetensors file per rank that owned something, and `manifest.json`,
written last. Each file's header lists its fragments, each a `parallel.tensor_slice.SliceRange`: elements
[start, start + count) of the flattened slice `slice_rank` of `slice_size` along `slice_dim` of a global tensor. Names
and shapes are global, so any layout can read what any other wrote.
"""

from __future__ import annotations

import hashlib
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from common.errors import CheckpointError, OtherFormatError
from common.files import sha256_of, write_file

FORMAT = 1
MANIFEST = "manifest.json"
PREFIX = "step-"
PACKAGES = ("torch", "deepspeed", "megatron-core", "numpy", "safetensors", "trainyard")


def folder_name(step: int) -> str:
    return f"{PREFIX}{step:08d}"


def package_versions() -> dict[str, str]:
    """Versions of what wrote a checkpoint, for the reader's information."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def file_entry(path: Path, sha256: str | None = None) -> dict[str, Any]:
    """What a manifest holds of a file. The file is read for its hash where none is given."""
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256 or sha256_of(path)}


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Write and flush the manifest; its own hash stands in it, so a torn one is noticed."""
    body = json.dumps(content, indent=1, sort_keys=True)
    text = json.dumps({"sha256": hashlib.sha256(body.encode()).hexdigest(), "body": json.loads(body)}, indent=1,
                      sort_keys=True)
    write_file(folder / MANIFEST, text)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest's content.

    Raises:
        CheckpointError: it is missing, torn or not JSON.
        OtherFormatError: another version of Trainyard wrote it, in another format.
    """
    path = folder / MANIFEST
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        body: dict[str, Any] = document["body"]
        expected = document["sha256"]
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no {MANIFEST}; this is not a complete checkpoint") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None
    found = hashlib.sha256(json.dumps(body, indent=1, sort_keys=True).encode()).hexdigest()
    if found != expected:
        raise CheckpointError(f"{path}: its content does not match its hash ({expected[:12]}, found {found[:12]})")
    if body.get("format") != FORMAT:
        writer = body.get("versions", {}).get("trainyard", "of an unknown version")
        here = package_versions()["trainyard"]
        raise OtherFormatError(f"{path}: Trainyard {writer} wrote this checkpoint in format {body.get('format')}, and "
                               f"Trainyard {here} reads format {FORMAT}. Continue with Trainyard {writer}, or choose "
                               "another run.dir")
    return body


def damaged_files(folder: Path, files: list[dict[str, Any]]) -> list[str]:
    """What is wrong with these files of a checkpoint (size first, then SHA-256); empty when all are whole."""
    problems = []
    for entry in files:
        path = folder / entry["name"]
        try:
            size = path.stat().st_size
            if size != entry["bytes"]:
                problems.append(f"{path}: {size} bytes instead of {entry['bytes']}")
            elif (found := sha256_of(path)) != entry["sha256"]:
                problems.append(f"{path}: SHA-256 {found[:12]} instead of {entry['sha256'][:12]}")
        except OSError as error:
            problems.append(f"{path}: {error.strerror}")
    return problems
