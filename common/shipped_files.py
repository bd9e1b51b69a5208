"""Where files lie that are installed with the package and are no code: recipes and job templates."""

import sysconfig
from pathlib import Path


def shipped_folder(name: str) -> Path:
    """The folder `configs` or `slurm`: of this source tree, else of the installed copy (see setup.py)."""
    beside = Path(__file__).parents[1] / name
    return beside if beside.is_dir() else Path(sysconfig.get_path("data"), "share", "trainyard", name)
