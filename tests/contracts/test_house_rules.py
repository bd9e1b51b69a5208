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
MAY_TOUCH_THE_ENVIRONMENT = {"parallel/ranks/rank_info.py", "parallel/ranks/rendezvous.py",
                             "parallel/eager_imports.py"}
MAY_PRINT = ("pretrain/training/hooks/console.py", "pretrain/commands/")
MAX_POSITIONAL = 4
MAY_BE_POSITIONAL = {"forward"}  # of modules and autograd functions, which torch calls
ERROR_BASE = "TrainyardError"
MAY_HAVE_ANOTHER_BASE = {"_Refused"}  # raised through PyYAML, which lets only its own errors pass
SLURM_PROGRAMS = {"sbatch", "squeue", "scancel", "scontrol"}
MAX_COMMON_LINES = 400


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


def _positional(arguments: ast.arguments) -> list[str]:
    found = [argument.arg for argument in [*arguments.posonlyargs, *arguments.args]]
    return found[1:] if found[:1] in (["self"], ["cls"]) else found


def _is_dataclass(node: ast.ClassDef) -> bool:
    """A dataclass whose fields are not all by keyword."""
    for decorator in node.decorator_list:
        call = decorator if isinstance(decorator, ast.Call) else None
        target = call.func if call else decorator
        if (target.id if isinstance(target, ast.Name) else getattr(target, "attr", "")) == "dataclass":
            return not any(keyword.arg == "kw_only" for keyword in (call.keywords if call else ()))
    return False


def _positional_fields(node: ast.ClassDef) -> list[str]:
    found = []
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            kind = ast.unparse(line.annotation)
            if kind.endswith("KW_ONLY"):
                break
            if not kind.startswith("ClassVar") and "init=False" not in ast.unparse(line):
                found.append(line.target.id)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_the_fifth_argument_and_later_ones_are_by_keyword(path):
    found = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name not in MAY_BE_POSITIONAL:
            found.append((f"{node.name}, line {node.lineno}", _positional(node.args)))
        elif isinstance(node, ast.ClassDef) and _is_dataclass(node):
            found.append((f"{node.name}, line {node.lineno}", _positional_fields(node)))
    assert [(where, words) for where, words in found if len(words) > MAX_POSITIONAL] == []


def test_every_error_of_ours_has_the_base():
    """So that the command line knows its exit code."""
    bases = {ERROR_BASE: ["Exception"]}
    for path in SOURCES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ClassDef):
                bases.setdefault(node.name, [ast.unparse(base).rpartition(".")[2] for base in node.bases])

    def ancestors(kind: str) -> set[str]:
        return {kind}.union(*(ancestors(base) for base in bases.get(kind, ())))

    errors = {kind for kind in bases if any(base.endswith(("Error", "Exception")) for base in ancestors(kind))}
    assert len(errors) > 12
    assert {kind for kind in errors if ERROR_BASE not in ancestors(kind)} - MAY_HAVE_ANOTHER_BASE == set()


def test_one_file_runs_the_programs_of_slurm():
    found = {name(path) for path in SOURCES for node in ast.walk(tree(path))
             if isinstance(node, ast.List) and node.elts and isinstance(node.elts[0], ast.Constant)
             and node.elts[0].value in SLURM_PROGRAMS}
    assert found == {"launchers/slurm_control.py"}


def test_common_ground_is_small_and_stands_on_the_standard_library():
    files = [path for path in SOURCES if name(path).startswith("common/")]
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files) <= MAX_COMMON_LINES
    modules = {module.partition(".")[0] for path in files for node in ast.walk(tree(path))
               for module in ([alias.name for alias in node.names] if isinstance(node, ast.Import)
                              else [node.module or ""] if isinstance(node, ast.ImportFrom) else [])}
    assert modules - {"common"} <= sys.stdlib_module_names
