"""Which way the arrows point: the table of allowed imports, and facts that import no torch."""

import ast
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("pretrain", "parallel", "data_pipeline", "launchers")
SOURCES = sorted(path.relative_to(ROOT).as_posix() for room in ROOMS for path in (ROOT / room).rglob("*.py"))

PARALLEL_FACTS = ("parallel", "parallel.config", "parallel.layout", "parallel.case", "parallel.rules",
                  "parallel.rank_info", "parallel.node_list", "parallel.planner.*")
DATA_FACTS = ("data_pipeline", "data_pipeline.config", "data_pipeline.errors", "data_pipeline.manifest",
              "data_pipeline.noise_facts")
SPEC_FACTS = ("pretrain", "pretrain.models", "pretrain.models.family", "pretrain.models.counting",
              "pretrain.models.encoder_decoder", "pretrain.models.mixture", "pretrain.models.hf_map",
              "pretrain.models.*.spec", "pretrain.models.*.hf")
OBJECTIVE_FACTS = ("pretrain.objectives", "pretrain.objectives.objective", "pretrain.objectives.*_spec")
CONFIG_FACTS = ("pretrain.errors", "pretrain.status", "pretrain.run_lock", "pretrain.config",
                "pretrain.config_file", "pretrain.config_reference", "pretrain.shipped", "pretrain.stop_files")
CHECKPOINT_FACTS = ("pretrain.checkpoint", "pretrain.checkpoint.manifest", "pretrain.checkpoint.start",
                    "pretrain.checkpoint.hf_config")
FACTS = (*PARALLEL_FACTS, *DATA_FACTS, *SPEC_FACTS, *OBJECTIVE_FACTS, *CONFIG_FACTS, *CHECKPOINT_FACTS)
CORE = ("parallel", "parallel.*", "pretrain.optim", "pretrain.metrics", "pretrain.quiet")

# File pattern: what of the project it may import, at most. The first line that fits decides.
TABLE = {
    "parallel/planner/*": PARALLEL_FACTS,
    **{f"{module.replace('.', '/')}.py": PARALLEL_FACTS for module in PARALLEL_FACTS[1:-1]},
    "parallel/*": ("parallel", "parallel.*"),
    **{f"{module.replace('.', '/')}.py": DATA_FACTS for module in DATA_FACTS[1:]},
    "data_pipeline/*": ("data_pipeline", "data_pipeline.*"),
    "launchers/*": ("launchers", "launchers.*", *FACTS),
    **{f"pretrain/models/*/{name}.py": (*PARALLEL_FACTS, *DATA_FACTS, *SPEC_FACTS) for name in ("spec", "hf")},
    **{f"pretrain/models/{name}.py": (*PARALLEL_FACTS, *DATA_FACTS, *SPEC_FACTS)
       for name in ("__init__", "family", "counting", "encoder_decoder", "mixture", "hf_map")},
    "pretrain/models/*": (*FACTS, *CORE, "pretrain.models.*"),
    **{f"pretrain/objectives/{name}.py": (*PARALLEL_FACTS, *DATA_FACTS, *SPEC_FACTS, *OBJECTIVE_FACTS)
       for name in ("__init__", "objective", "*_spec")},
    "pretrain/objectives/*": (*FACTS, *CORE, "data_pipeline.*", "pretrain.models.*", "pretrain.objectives.*"),
    **{f"{module.replace('.', '/')}.py": FACTS for module in CONFIG_FACTS},
    **{f"{module.replace('.', '/')}.py": FACTS for module in CHECKPOINT_FACTS[1:]},
    "pretrain/checkpoint/hf_encoding.py": (*FACTS, "data_pipeline.tokenizer", "pretrain.checkpoint.hf_folder"),
    "pretrain/checkpoint/hf_tokenizer.py": (*FACTS, "data_pipeline.pieces", "data_pipeline.tokenizer"),
    "pretrain/checkpoint/*": (*FACTS, *CORE, "pretrain.checkpoint", "pretrain.checkpoint.*", "pretrain.models.*"),
    "pretrain/hooks/*": (*FACTS, *CORE, "pretrain.hooks", "pretrain.hooks.*", "pretrain.checkpoint.*"),
    "pretrain/optim.py": (*FACTS, *CORE),
    "pretrain/metrics.py": (*FACTS, *CORE),
    "pretrain/quiet.py": (*FACTS, *CORE),
    "pretrain/cli.py": (*FACTS, "pretrain.commands.*"),
    "pretrain/__main__.py": ("pretrain.cli",),
    "pretrain/commands/*": ("*",),
    "pretrain/evaluation/*": (*FACTS, *CORE, "data_pipeline.*", "pretrain.models*", "pretrain.objectives*",
                              "pretrain.evaluation*", "pretrain.trained", "pretrain.generation"),
    "pretrain/*": (*FACTS, *CORE, "data_pipeline.*", "pretrain.models*", "pretrain.objectives*", "pretrain.checkpoint*",
                   "pretrain.hooks*", "pretrain.loop", "pretrain.attempt", "pretrain.grace", "pretrain.datasets",
                   "pretrain.trained", "pretrain.generation", "pretrain.rank_facts"),
}
DOORWAYS = {  # library: the only files that may import it
    "deepspeed": ("parallel/zero.py",),
    "megatron": ("parallel/megatron.py",),
    "webdataset": ("data_pipeline/*",),
    "sentencepiece": ("data_pipeline/*",),
    "transformers": ("pretrain/checkpoint/*",),
    "mpi4py": ("parallel/rendezvous.py", "data_pipeline/*"),
}


def imports(path: str) -> list[str]:
    """Every module that a file names, inside functions as well; `from a import b` may name module a.b."""
    found = []
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found += [f"{node.module}.{alias.name}" if is_module(f"{node.module}.{alias.name}") else node.module
                      for alias in node.names]
    return found


def is_module(dotted: str) -> bool:
    path = ROOT / dotted.replace(".", "/")
    return dotted.partition(".")[0] in ROOMS and (path.is_dir() or path.with_suffix(".py").is_file())


@pytest.mark.parametrize("path", SOURCES)
def test_arrows(path):
    allowed = next(allowed for pattern, allowed in TABLE.items() if fnmatch(path, pattern))
    ours = [module for module in imports(path) if module.partition(".")[0] in ROOMS]
    assert [module for module in ours if not any(fnmatch(module, pattern) for pattern in allowed)] == []


@pytest.mark.parametrize("path", SOURCES)
def test_doorways(path):
    libraries = {module.partition(".")[0] for module in imports(path)}
    assert [library for library in libraries & set(DOORWAYS)
            if not any(fnmatch(path, pattern) for pattern in DOORWAYS[library])] == []


def fact_modules() -> list[str]:
    modules = [path.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in SOURCES]
    return [module for module in modules
            if any(fnmatch(module, pattern) for pattern in FACTS) or module.startswith("launchers")]


@pytest.mark.parametrize("module", ["all of them", "pretrain.config", "pretrain.cli"])
def test_facts_import_no_torch(module):
    modules = fact_modules() if module == "all of them" else [module]
    assert len(modules) > 15 or module != "all of them"
    heavy = ("torch", "deepspeed", "megatron", "webdataset", "sentencepiece", "numpy", "rich", "matplotlib",
             "transformers")
    code = (f"import importlib, sys\nfor name in {modules}: importlib.import_module(name)\n"
            f"print(sorted(set({heavy}) & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "[]\n"
