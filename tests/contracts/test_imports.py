"""Which way the arrows point: the table of allowed imports, and modules that import no torch."""

import ast
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("common", "pretrain", "parallel", "data_pipeline", "launchers")
SOURCES = sorted(path.relative_to(ROOT).as_posix() for room in ROOMS for path in (ROOT / room).rglob("*.py"))

# Modules that a login node can import: they load no torch.
PARALLEL_LIGHT = ("parallel.config", "parallel.layout", "parallel.rules", "parallel.rules.*", "parallel.planner.*",
                  "parallel.zero.settings", "parallel.ranks.rank_info", "parallel.ranks.slurm_node_list")
DATA_LIGHT = ("data_pipeline.config", "data_pipeline.folder.manifest", "data_pipeline.folder.retries",
              "data_pipeline.corruption.special_ids", "data_pipeline.corruption.noise_seed")
FAMILY_LIGHT = ("pretrain.models", "pretrain.models.family", "pretrain.models.shapes",
                "pretrain.models.encoder_decoder*", "pretrain.models.mixture", "pretrain.models.hf_*",
                "pretrain.models.*.spec", "pretrain.models.*.hf")
OBJECTIVE_LIGHT = ("pretrain.objectives", "pretrain.objectives.objective", "pretrain.objectives.*_spec")
CHECKPOINT_LIGHT = ("pretrain.checkpoint.manifest", "pretrain.checkpoint.locate", "pretrain.checkpoint.start_weights")
LIGHT = ("common.*", "launchers.*", *PARALLEL_LIGHT, *DATA_LIGHT, *FAMILY_LIGHT, *OBJECTIVE_LIGHT, *CHECKPOINT_LIGHT,
         "pretrain.config.*", "pretrain.hf.config_json", "pretrain.reporting", "pretrain.training.stop_signals",
         "pretrain.training.stop_watchdog")

# File pattern: what of the project it may import, at most. The first row that fits decides. A row for each sub-room,
# from the ground up: nothing imports a room that stands below its own row, but for the light modules named.
TABLE = {
    "common/*": ("common.*",),
    "parallel/config.py": (),
    "parallel/layout.py": ("parallel.config",),
    "parallel/rules/*": ("common.*", *PARALLEL_LIGHT),
    "parallel/planner/*": ("common.*", *PARALLEL_LIGHT),
    "parallel/ranks/rank_info.py": ("common.*", *PARALLEL_LIGHT),
    "parallel/ranks/slurm_node_list.py": ("common.*",),
    "parallel/ranks/*": ("common.*", "parallel.ranks.*"),
    "parallel/zero/settings.py": ("parallel.config", "parallel.layout"),
    "parallel/zero/*": ("common.*", *PARALLEL_LIGHT, "parallel.zero.*", "parallel.process_groups",
                        "parallel.tensor_parallel", "parallel.pipeline_stages", "parallel.chunked_loss",
                        "parallel.eager_imports", "parallel.parameter_plan"),
    "parallel/checks/*": ("common.*", *PARALLEL_LIGHT, "parallel.process_groups", "parallel.ranks.agreement",
                          "parallel.engine"),
    "parallel/engine.py": ("common.*", "parallel.*"),
    "parallel/single_rank.py": ("parallel.layout", "parallel.process_groups", "parallel.ranks.*"),
    "parallel/*": ("common.*", *PARALLEL_LIGHT, *(f"parallel.{name}" for name in (
        "process_groups", "tensor_parallel", "context_parallel", "expert_parallel", "load_balance", "pipeline_stages",
        "parameter_plan", "normal_numbers", "tensor_slice", "gradient_cache", "chunked_loss", "random_streams",
        "recompute", "precision", "objective", "loss_terms", "eager_imports"))),
    "data_pipeline/config.py": ("common.*", "data_pipeline.folder.manifest"),
    "data_pipeline/corruption/special_ids.py": (),
    "data_pipeline/corruption/noise_seed.py": (),
    "data_pipeline/folder/*": ("common.*", "data_pipeline.folder.*"),
    "data_pipeline/left_out.py": ("common.*",),
    "data_pipeline/text/*": ("common.*", "data_pipeline.left_out", "data_pipeline.text.*"),
    "data_pipeline/keyed_permutation.py": ("common.*",),
    "data_pipeline/order.py": ("common.*", "data_pipeline.keyed_permutation"),
    "data_pipeline/batch_plan.py": (),
    "data_pipeline/samples.py": (),
    "data_pipeline/unusable.py": ("data_pipeline.samples",),
    "data_pipeline/workers.py": ("common.*", "data_pipeline.samples"),
    "data_pipeline/loader.py": ("common.*", "data_pipeline.batch_plan", "data_pipeline.samples",
                                "data_pipeline.unusable", "data_pipeline.workers"),
    "data_pipeline/tokens/*": ("common.*", "data_pipeline.order", "data_pipeline.text.*", "data_pipeline.folder.*",
                               "data_pipeline.tokens.*"),
    "data_pipeline/image_text/*": ("common.*", "data_pipeline.keyed_permutation", "data_pipeline.samples",
                                   "data_pipeline.left_out", "data_pipeline.text.*", "data_pipeline.folder.*",
                                   "data_pipeline.image_text.*"),
    "data_pipeline/corruption/*": ("common.*", "data_pipeline.samples", "data_pipeline.text.*",
                                   "data_pipeline.corruption.*"),
    "data_pipeline/verify.py": ("common.*", "data_pipeline.*"),
    "launchers/slurm_control.py": ("common.*", "parallel.ranks.rank_info"),
    "launchers/run_folder/*": ("common.*", "parallel.ranks.rank_info", "launchers.slurm_control",
                               "launchers.run_folder.*"),
    "launchers/local/*": ("common.*", "parallel.ranks.rank_info", "launchers.local.*"),
    "launchers/supervise/*": ("common.*", "parallel.ranks.rank_info", "launchers.slurm_control",
                              "launchers.run_folder.*", "launchers.local.*", "launchers.supervise.*"),
    "launchers/*": ("common.*", *PARALLEL_LIGHT, "launchers.*"),
    "pretrain/models/*/spec.py": ("common.*", *PARALLEL_LIGHT, *DATA_LIGHT, *FAMILY_LIGHT),
    "pretrain/models/*/hf.py": ("common.*", *PARALLEL_LIGHT, *DATA_LIGHT, *FAMILY_LIGHT),
    **{f"pretrain/models/{name}.py": ("common.*", *PARALLEL_LIGHT, *DATA_LIGHT, *FAMILY_LIGHT)
       for name in ("__init__", "family", "shapes", "encoder_decoder*", "mixture", "hf_*")},
    "pretrain/models/*": ("common.*", "parallel.*", *DATA_LIGHT, "pretrain.models*"),
    **{f"pretrain/objectives/{name}.py": ("common.*", *PARALLEL_LIGHT, *DATA_LIGHT, *FAMILY_LIGHT, *OBJECTIVE_LIGHT)
       for name in ("__init__", "objective", "*_spec")},
    "pretrain/objectives/*": ("common.*", "parallel.*", "data_pipeline.*", "pretrain.models*", "pretrain.objectives*"),
    "pretrain/checkpoint/manifest.py": ("common.*",),
    "pretrain/checkpoint/locate.py": ("common.*", "pretrain.checkpoint.manifest"),
    "pretrain/checkpoint/start_weights.py": ("common.*", *PARALLEL_LIGHT, *FAMILY_LIGHT, *CHECKPOINT_LIGHT),
    "pretrain/config/*": ("common.*", *PARALLEL_LIGHT, *DATA_LIGHT, *FAMILY_LIGHT, *OBJECTIVE_LIGHT, *CHECKPOINT_LIGHT,
                          "pretrain.config.*"),
    "pretrain/checkpoint/*": ("common.*", *LIGHT, "parallel.*", "pretrain.checkpoint.*"),
    "pretrain/hf/*": ("common.*", *LIGHT, "parallel.*", "data_pipeline.*", "pretrain.models*", "pretrain.objectives*",
                      "pretrain.checkpoint.*", "pretrain.hf.*"),
    "pretrain/training/stop_signals.py": ("common.*", "launchers.run_folder.stop_requests"),
    "pretrain/training/stop_watchdog.py": ("common.*", "pretrain.training.stop_signals"),
    "pretrain/training/hooks/*": ("common.*", *LIGHT, "parallel.*", "pretrain.training.metrics",
                                  "pretrain.training.third_party_output", "pretrain.training.hooks*"),
    "pretrain/training/tasks/*": ("common.*", *LIGHT, "parallel.*", "data_pipeline.*", "pretrain.models*",
                                  "pretrain.objectives*", "pretrain.training.*"),
    "pretrain/training/*": ("common.*", *LIGHT, "parallel.*", "data_pipeline.*", "pretrain.models*",
                            "pretrain.objectives*", "pretrain.checkpoint.*", "pretrain.training.*"),
    "pretrain/inference/*": ("common.*", *LIGHT, "parallel.*", "data_pipeline.*", "pretrain.models*",
                             "pretrain.objectives*", "pretrain.checkpoint.*", "pretrain.hf.*",
                             "pretrain.training.datasets", "pretrain.inference.*"),
    "pretrain/selfcheck/*": ("common.*", *LIGHT, "parallel.*", "pretrain.training.*", "pretrain.selfcheck.*"),
    "pretrain/reporting.py": ("common.*",),
    "pretrain/cli.py": ("common.*", "pretrain.commands.*", "pretrain.reporting"),
    "pretrain/__main__.py": ("pretrain.cli",),
    "pretrain/commands/*": ("*",),
    "pretrain/__init__.py": (),
    "launchers/__init__.py": (), "parallel/__init__.py": (), "data_pipeline/__init__.py": (),
}
DOORWAYS = {  # library: the only files that may import it
    "deepspeed": ("parallel/zero/*",),
    "megatron": ("parallel/process_groups.py", "parallel/tensor_parallel.py"),
    "webdataset": ("data_pipeline/*",),
    "sentencepiece": ("data_pipeline/*",),
    "pyarrow": ("data_pipeline/text/*",),
    "fsspec": ("data_pipeline/text/*",),
    "transformers": ("pretrain/hf/*",),
    "mpi4py": ("parallel/ranks/rendezvous.py", "data_pipeline/*"),
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


def light_modules() -> list[str]:
    modules = [path.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in SOURCES]
    return [module for module in modules if any(fnmatch(module, pattern) for pattern in LIGHT)]


HEAVY = ("torch", "deepspeed", "megatron", "webdataset", "sentencepiece", "numpy", "PIL", "rich", "matplotlib",
         "safetensors", "transformers", "mpi4py")


def loaded_by(code: str, *argv: str) -> str:
    """The heavy libraries that a fresh process has loaded after running this code."""
    code += f"\nimport sys; sys.stderr.write(str(sorted(set({HEAVY}) & set(sys.modules))))"
    return subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=True,
                          cwd=ROOT).stderr.rpartition("\n")[2]


@pytest.mark.parametrize("module", ["all of them", "pretrain.config.run_config", "pretrain.cli",
                                    "pretrain.training.stop_watchdog"])
def test_light_modules_import_no_torch(module):
    modules = light_modules() if module == "all of them" else [module]
    assert len(modules) > 15 or module != "all of them"
    assert loaded_by(f"import importlib\nfor name in {modules}: importlib.import_module(name)") == "[]"


@pytest.mark.parametrize("verb", ["--help", "train --help", "submit --help", "submit", "status", "cancel --help",
                                  "checkpoint --help", "generate --help", "evaluate --help", "demo --help"])
def test_verbs_that_do_not_compute_load_nothing_heavy(verb, recipe, tmp_path):
    """On a login node, and at once."""
    argv = {"submit": ["submit", str(recipe), "--launcher", "torchrun", "--print", f"run.dir={tmp_path / 'run'}"],
            "status": ["status", str(tmp_path)]}.get(verb, verb.split())
    code = "import sys, contextlib\nfrom pretrain.cli import main\n" \
           "with contextlib.suppress(SystemExit): assert main(sys.argv[1:]) == 0"
    assert loaded_by(code, *argv) == "[]"
