"""What the pages tell people to type is legal today."""

import re
import shlex
from pathlib import Path

import pytest

from pretrain.cli import main

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def submissions(page: str) -> list[str]:
    """Every `trainyard submit` of a page that names its config, in one line."""
    blocks = "".join(BLOCK.findall((ROOT / page).read_text(encoding="utf-8")))
    lines = blocks.replace("\\\n", " ").splitlines()
    return [line.partition(" #")[0] for line in lines if line.startswith("trainyard submit configs/")]


@pytest.mark.parametrize("line", submissions("slurm/README.md"))
def test_a_submission_can_be_printed(line, dataset, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = [word for word in shlex.split(line)[1:] if word != "--wait"]
    assert main([*words, "--print", f"data.train={dataset / 'train'}", f"data.heldout={dataset / 'heldout'}"]) == 0
    assert capsys.readouterr().out.startswith("#!/bin/bash\n")


def test_there_are_submissions():
    assert len(submissions("slurm/README.md")) >= 3
