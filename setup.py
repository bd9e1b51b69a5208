"""The package. Versions here are ranges; constraints.txt pins the ones that were tested together."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "([^"]+)"', (ROOT / "pretrain" / "__init__.py").read_text(encoding="utf-8"))[1]
SHIPPED = ("configs", "slurm")  # installed under share/trainyard, see common/shipped_files.py


def shipped_files() -> list[tuple[str, list[str]]]:
    """Recipes and job templates by target folder, as paths relative to this file."""
    folders = sorted({path.parent for name in SHIPPED for path in (ROOT / name).rglob("*") if path.is_file()})
    return [
        (f"share/trainyard/{folder.relative_to(ROOT).as_posix()}",
         sorted(path.relative_to(ROOT).as_posix() for path in folder.iterdir() if path.is_file()))
        for folder in folders
    ]


setup(
    name="trainyard",
    version=VERSION,
    description="Pretrains large models on many accelerators",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=[
        room + below for room in ("common", "pretrain", "parallel", "data_pipeline", "launchers")
        for below in ("", ".*")
    ]),
    data_files=shipped_files(),
    install_requires=[
        "torch>=2.11,<3",
        "deepspeed>=0.19,<0.20",
        "megatron-core>=0.16,<0.17",
        "webdataset>=1,<2",
        "braceexpand>=0.1.7,<1",
        "sentencepiece>=0.2,<0.3",
        "pyarrow>=15",
        "fsspec>=2024.2",
        "protobuf>=4",
        "pydantic>=2.8,<3",
        "PyYAML>=6,<7",
        "numpy>=1.26,<3",
        "rich>=13",
        "tensorboard>=2.16",
        "matplotlib>=3.8",
        "safetensors>=0.4",
        "Pillow>=10.1",
    ],
    extras_require={
        "mpi": ["mpi4py>=4,<5"],
        "hf": ["transformers>=5"],
        "dev": ["setuptools>=70.1", "pytest>=8", "pytest-timeout>=2", "pytest-xdist>=3.6", "hypothesis>=6", "ruff>=0.6",
                "mypy>=2", "types-PyYAML>=6", "transformers>=5"],
    },
    entry_points={"console_scripts": ["trainyard = pretrain.cli:main"]},
)
