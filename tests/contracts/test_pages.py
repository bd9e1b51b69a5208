"""The pages are true: submissions that they show are legal, files that they name exist, links resolve."""

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


PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")})
CODE_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
NAMED = re.compile(r"`([\w.*/-]+)`")
FILE = re.compile(r"[\w*.-]*\w\.(?:py|md|yaml|sbatch|toml|cfg)")
ROOMS = ("common", "parallel", "data_pipeline", "launchers", "pretrain", "configs", "tests", "benchmarks", "docs",
         "slurm")
WRITTEN_BY_USERS = {"config.yaml", "my.sbatch", "job.sbatch"}  # and by runs
OF_EACH_FAMILY = {"spec.py", "modules.py", "hf.py"}
EXAMPLES = ("neox", "noised", "max_loss", "mpich", "NAME")  # files that CONTRIBUTING.md adds


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def is_there(page: Path, path: str) -> bool:
    """Whether a path exists: from the top, or from a room; the page of a room may name any file in it by name alone."""
    if page.parent == ROOT:
        return any(ROOT.glob(path)) or any(ROOT.glob(f"*/{path}"))
    return any(ROOT.glob(path)) or any(page.parent.glob(path)) or ("/" not in path and any(page.parent.rglob(path)))


def is_a_path(word: str) -> bool:
    """Whether it looks like a file of the project, or begins with one of its rooms."""
    return FILE.fullmatch(word.rpartition("/")[2]) is not None or ("/" in word and word.partition("/")[0] in ROOMS)


def named_paths(page: Path) -> set[str]:
    words = NAMED.findall(CODE_FENCE.sub("", page.read_text(encoding="utf-8")))
    found = {word for word in words if is_a_path(word)} - WRITTEN_BY_USERS - OF_EACH_FAMILY
    is_example = page.name == "CONTRIBUTING.md"
    return {word for word in found if not (is_example and any(example in word for example in EXAMPLES))}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_that_a_page_names_exist(page):
    assert sorted(path for path in named_paths(page) if not is_there(page, path)) == []


def test_pages_name_files():
    assert len({path for page in PAGES for path in named_paths(page)}) > 150


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_of_a_page_lead_somewhere(page):
    text = CODE_FENCE.sub("", page.read_text(encoding="utf-8"))
    links = {link.partition("#")[0] for link in LINK.findall(text) if "://" not in link}
    assert sorted(link for link in links if link and not (page.parent / link).exists()) == []
