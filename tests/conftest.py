"""What every test may use: one small real dataset, made once a session, and recipes over it."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest

from data_pipeline.image_text.synthetic_shapes import write_shapes
from tests.helpers import devices
from tests.helpers.recipes import write_drawn_dataset, write_recipe

devices.hide()

# What `make quick` takes of the suites that start many ranks; the rest of them is marked slow.
QUICK = ("[tied-tp2-pp1-dp2-zero1-sp1]", "[tied-tp1-pp2-dp2-zero1-sp0]", "[tied-tp1-pp1-dp2-zero3-sp0]",
         "test_a_finished_run_started_again", "test_killed_at_a_random_step[one-rank]", "test_several_at_once")


def pytest_collection_modifyitems(items):
    for item in items:
        starts_ranks = item.path.parent.name in ("parity", "e2e")
        if starts_ranks and not any(name in item.nodeid for name in QUICK):
            item.add_marker(pytest.mark.slow)


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
def dataset(tmp_path_factory) -> Path:
    """A folder with `train` and `heldout`: drawn prose, a vocabulary of 512."""
    return write_drawn_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="session")
def recipe(dataset, tmp_path_factory) -> Path:
    """A config of a GPT that steps in milliseconds and divides by 4 everywhere."""
    return write_recipe(tmp_path_factory.mktemp("recipe") / "gpt.yaml", dataset)


@pytest.fixture(scope="session")
def shapes(tmp_path_factory) -> Path:
    """A folder with `train`, `heldout` and `zero-shot`: drawn scenes with captions."""
    folder = tmp_path_factory.mktemp("shapes")
    write_shapes(folder, num_train=200, num_test=32, seed=3, size=24)
    return folder
