"""What every test may use: one small real dataset, made once a session, and recipes over it."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from data_pipeline.image_text.synthetic_shapes import write_shapes
from tests.helpers import devices
from tests.helpers.recipes import write_drawn_dataset, write_recipe
from tests.helpers.shared import make_once

devices.hide()

# A busy machine is no reason to fail: neither a slow example nor slow generation of examples.
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")

STARTS_RANKS = ("parity", "e2e")  # folders whose tests say themselves whether `make quick` takes them


def pytest_collection_modifyitems(items):
    for item in items:  # a file's tests share what they set up, so one process runs them; parity shares through `runs`
        if item.path.parent.name != "parity":
            item.add_marker(pytest.mark.xdist_group(item.path.relative_to(item.config.rootpath).as_posix()))
    unmarked = {item.nodeid for item in items if item.path.parent.name in STARTS_RANKS
                and not any(item.iter_markers("slow")) and not any(item.iter_markers("quick"))}
    if unmarked:
        raise pytest.UsageError(f"{len(unmarked)} tests are marked neither slow nor quick, first {min(unmarked)}")


@pytest.fixture(autouse=True)
def _environment_stays():
    """What a test exports for libraries (RANK and its like) is not there for the next one."""
    before = dict(os.environ)
    yield
    if dict(os.environ) != before:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="session", autouse=True)
def _fork_server_ends():
    """The fork server would otherwise outlive the suite by a moment and hold its output open."""
    yield
    from multiprocessing import forkserver

    if multiprocessing.get_start_method(allow_none=True) or forkserver._forkserver._forkserver_pid:
        forkserver._forkserver._stop()


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory, pytestconfig) -> Path:
    """A folder of this session that all of its worker processes see."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if hasattr(pytestconfig, "workerinput") else own


@pytest.fixture(scope="session")
def dataset(shared_folder) -> Path:
    """A folder with `train` and `heldout`: drawn prose, a vocabulary of 512."""
    return make_once(shared_folder / "dataset", write_drawn_dataset)


@pytest.fixture(scope="session")
def recipe(dataset, tmp_path_factory) -> Path:
    """A config of a GPT that steps in milliseconds and divides by 4 everywhere."""
    return write_recipe(tmp_path_factory.mktemp("recipe") / "gpt.yaml", dataset)


@pytest.fixture(scope="session")
def shapes(shared_folder) -> Path:
    """A folder with `train`, `heldout` and `zero-shot`: drawn scenes with captions."""
    return make_once(shared_folder / "shapes", lambda folder: write_shapes(folder, num_train=200, num_test=32, seed=3,
                                                                         size=24))
