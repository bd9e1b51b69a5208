"""The rules of the house that a machine can check."""

import ast
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("common", "pretrain", "parallel", "data_pipeline", "launchers")
SOURCES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
ALL = sorted([*SOURCES, *(path for folder in ("tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")),
              ROOT / "setup.py"])
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 80
# the first reads it, the second writes it for libraries
MAY_TOUCH_THE_ENVIRONMENT = {"parallel/ranks/rank_info.py", "parallel/ranks/rendezvous.py"}
MAY_PRINT = ("pretrain/training/hooks/console.py", "pretrain/commands/")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=name(path))


@pytest.mark.parametrize("path", ALL, ids=name)
def test_sizes(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES
    long = [f"{node.name}: {node.end_lineno - node.lineno + 1} lines" for node in ast.walk(tree(path))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            and node.end_lineno - node.lineno >= MAX_FUNCTION_LINES]
    assert long == []


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_nothing_global_is_rebound(path):
    assert [node.lineno for node in ast.walk(tree(path)) if isinstance(node, ast.Global)] == []


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_calls_that_are_not_for_every_room(path):
    """Printing, reading the environment, unpickling, shells."""
    found = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print" \
                and not name(path).startswith(MAY_PRINT):
            found.append(f"line {node.lineno}: print")
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "environb") \
                and isinstance(node.value, ast.Name) and node.value.id == "os" \
                and name(path) not in MAY_TOUCH_THE_ENVIRONMENT:
            found.append(f"line {node.lineno}: os.{node.attr}")
        if isinstance(node, ast.keyword) and node.arg in ("shell", "allow_pickle") \
                and not (isinstance(node.value, ast.Constant) and node.value.value is False):
            found.append(f"line {node.value.lineno}: {node.arg}")
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
            found += [f"line {node.lineno}: {module}" for module in modules if module in ("pickle", "marshal")]
    assert found == []


def test_no_file_is_named_like_a_library_it_could_hide():
    """A script run from its own folder would import itself instead of the library."""
    libraries = {"deepspeed", "megatron", "webdataset", "torch", "pydantic", "yaml", "rich", "numpy", "sentencepiece"}
    libraries |= {package for package in packages_distributions() if not (ROOT / package).exists()}
    libraries |= sys.stdlib_module_names
    allowed = {"pretrain/training/hooks/tensorboard.py"}  # nothing in its folder is a script
    hidden = [name(path) for path in SOURCES if path.stem in libraries and name(path) not in allowed
              and not path.stem.startswith("__")]
    assert hidden == []


def test_every_room_of_code_is_a_package():
    folders = {path.parent for path in SOURCES}
    assert sorted(name(folder) for folder in folders if not (folder / "__init__.py").exists()) == []
