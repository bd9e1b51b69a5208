"""What an installed copy holds: every room, the recipes, the command."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("common", "pretrain", "parallel", "data_pipeline", "launchers")


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The package as pip lays it out under a prefix: code in `lib`, data beside it."""
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"  # a copy, so that nothing is built inside the tree
    for room in (*ROOMS, "configs", "slurm"):
        for path in (ROOT / room).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                target = source / path.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
    (source / "setup.py").write_bytes((ROOT / "setup.py").read_bytes())
    subprocess.run([sys.executable, "setup.py", "-q", "bdist_wheel", "--dist-dir", str(folder)], cwd=source, check=True,
                   capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "lib")
    return folder / "lib"


def files(folder: Path, *names: str) -> set[str]:
    return {path.relative_to(folder).as_posix() for name in names for path in (folder / name).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts}


def test_every_source_file_is_installed(installed):
    sources = {path for path in files(ROOT, *ROOMS) if path.endswith(".py")}
    assert files(installed, *ROOMS) == sources


def test_recipes_and_templates_are_installed(installed):
    (data,) = installed.glob("*.data")
    assert files(data / "data" / "share" / "trainyard", "configs", "slurm") == files(ROOT, "configs", "slurm")


def test_the_command_answers_without_the_source_tree(installed, tmp_path):
    entry = next(installed.glob("*.dist-info")) / "entry_points.txt"
    assert "trainyard = pretrain.cli:main" in entry.read_text()
    code = "import sys, pretrain; from pretrain.cli import main; print(pretrain.__file__); sys.exit(main(['--help']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True,
                          env={**os.environ, "PYTHONPATH": str(installed)})
    assert done.stdout.startswith(str(installed))
    assert "train" in done.stdout
