"""`trainyard checkpoint export` and `import`: to and from the folders of transformers."""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import ConfigError, ConversionError, ExitCode, UserError
from common.number_formats import NUMBER_FORMATS
from pretrain.config.run_config import RunConfig, config_from
from pretrain.hf.config_json import choose_architecture, token_ids_of
from pretrain.models import family_spec

if TYPE_CHECKING:
    import torch

    from parallel.process_groups import Groups
    from pretrain.checkpoint.reader import Checkpoint
    from pretrain.hf.export_folder import Export
    from pretrain.hf.read_folder import HFFolder

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
UNMEASURED = "not measured, as asked: --no-certificate"


def add_verbs(verbs: argparse._SubParsersAction) -> None:
    """The two verbs of conversion."""
    export = verbs.add_parser("export", help="write a transformers folder, and prove it", description="Writes "
                              "config.json, safetensors files, the tokenizer and certificate.json, which holds the "
                              "largest difference of logits between the training model and transformers.")
    export.add_argument("checkpoint", metavar="CKPT", type=Path, help="a run folder, or one checkpoint in it")
    export.add_argument("--to", metavar="DIR", type=Path, required=True, help="the folder to write; it must not exist")
    export.add_argument("--dtype", choices=NUMBER_FORMATS, default="fp32", help="number format of the weights (fp32)")
    export.add_argument("--architecture", metavar="NAME", help="the model_type to write, where several fit (the first)")
    export.add_argument("--no-tokenizer", action="store_true", help="leave the tokenizer's files out")
    export.add_argument("--no-certificate", action="store_true", help="do not measure: for a model that fits on no "
                        "single machine; certificate.json then says so")
    read = verbs.add_parser("import", help="make a checkpoint of a transformers folder", description="Writes a run "
                            "folder with one checkpoint (weights only) and a config.yaml that starts from it.")
    read.add_argument("folder", metavar="HF_DIR", type=Path, help="a folder with config.json and safetensors files")
    read.add_argument("--to", metavar="DIR", type=Path, required=True, help="the run folder to write; a new one")
    for parser in (export, read):
        parser.add_argument("--shard-size", metavar="SIZE", default="2GB", type=_bytes,
                            help="most bytes of one file, as 500MB or 2GB (2GB)")


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+)(KB|MB|GB)", text)
    if not match or not int(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no size: a number and KB, MB or GB, as 2GB")
    return int(match[1]) * UNITS[match[2]]


# -- export ------------------------------------------------------------------------------------------------------------


def export(args: argparse.Namespace) -> int:
    """Write the folder and say what was measured. Returns the exit code."""
    if not args.checkpoint.exists():
        raise UserError(f"{args.checkpoint}: no such folder. Give a run folder, or one of its checkpoints")
    _must_be_new(args.to)
    from parallel.single_rank import single_rank
    from pretrain.hf.export_folder import export as write
    from pretrain.inference.trained_model import open_checkpoint

    with single_rank() as groups:
        checkpoint = open_checkpoint(args.checkpoint)
        config = config_from(checkpoint.manifest["config"], str(checkpoint.folder))
        what = _what(args, checkpoint, config, groups)

        def certify(folder: Path) -> dict[str, Any]:
            if args.no_certificate:
                return {"within": True, "largest_differences": None, "why": UNMEASURED, **_facts(checkpoint, config)}
            return _measured(what, folder, checkpoint, config, groups)

        told = write(what, args.to, certify)
    sys.stdout.write(f"{args.to}: {what.architecture.class_name(what.model)} of step {checkpoint.manifest['step']}\n")
    differences = told["largest_differences"]
    sys.stdout.write("largest difference of logits: "
                     + (f"{max(differences.values()):.2g}, at most {told['bound']:.2g}" if differences else UNMEASURED)
                     + "\n")
    return ExitCode.DONE


def _what(args: argparse.Namespace, checkpoint: Checkpoint, config: RunConfig, groups: Groups) -> Export:
    """The export that was asked for. Raises ConfigError with what the architecture cannot say of the model."""
    from pretrain.hf.export_folder import Export
    from pretrain.models.build import global_shapes

    imported = checkpoint.manifest.get("imported", {})
    family = config.model.family
    asked = args.architecture or imported.get("architecture")
    try:
        architecture, problems = choose_architecture(family, config.model, asked)
    except LookupError as error:
        raise UserError(f"--architecture {asked}: the family {family} can be written as {error}") from None
    if problems:
        raise ConfigError(problems, f"{checkpoint.folder} as {architecture.model_type}")
    write_tokenizer, token_ids = _tokenizer(checkpoint, config)
    what = Export(config.model, global_shapes(config.model, groups), checkpoint.tensor, architecture, token_ids,
                  args.dtype, args.shard_size)
    return what if args.no_tokenizer else replace(what, write_tokenizer=write_tokenizer)


def _tokenizer(checkpoint: Checkpoint, config: RunConfig) -> tuple[Callable[[Path], None], dict[str, int]]:
    """What writes the tokenizer's files into a folder, and the ids that config.json names.

    An imported model's files go out as they came in.
    """
    from pretrain.hf.import_folder import TOKENIZER_FILES
    from pretrain.hf.tokenizer_export import export_tokenizer
    from pretrain.inference.trained_model import load_tokenizer

    def copy_files(folder: Path) -> None:
        for source in map(checkpoint.folder.joinpath, TOKENIZER_FILES):
            if source.is_file():
                shutil.copyfile(source, folder / source.name)

    if "imported" in checkpoint.manifest:
        return copy_files, checkpoint.manifest["imported"]["token_ids"]
    tokenizer = load_tokenizer(checkpoint)
    return partial(export_tokenizer, tokenizer, config), token_ids_of(config, tokenizer.end_of_text)


def _facts(checkpoint: Checkpoint, config: RunConfig) -> dict[str, Any]:
    from pretrain.checkpoint.manifest import MANIFEST

    digest = hashlib.sha256((checkpoint.folder / MANIFEST).read_bytes()).hexdigest()
    return {"layout": {"tensor": config.parallel.tensor, "sequence": config.parallel.sequence},
            "checkpoint": {"step": checkpoint.manifest["step"], "manifest_sha256": digest}}


def _measured(what: Export, folder: Path, checkpoint: Checkpoint, config: RunConfig, groups: Groups) -> dict[str, Any]:
    """The certificate of a folder, from both sides."""
    from parallel.precision import DTYPES
    from pretrain.hf.certificate import certificate, folder_outputs, sample_inputs, training_outputs

    parallel = config.parallel
    end_id = what.token_ids.get("eos_token_id")
    sample = sample_inputs(what.model, what.architecture, end_id, parallel.tensor)
    if parallel.tensor > 1:
        ours = _outputs_of_ranks(checkpoint.folder, parallel.tensor, sample, what.dtype)
    else:
        ours = training_outputs(what.model, groups, checkpoint.read, DTYPES[what.dtype], sample=sample)
    try:
        theirs = folder_outputs(folder, what.architecture, what.model, sample)
    except ImportError:
        raise UserError("the certificate needs transformers: pip install 'trainyard[hf]', or leave the measurement out "
                        "with --no-certificate") from None
    except (ValueError, RuntimeError, KeyError) as error:
        raise ConversionError(f"transformers does not load the exported folder: {error}. This is a defect in the name "
                              f"map of {what.architecture.model_type}") from None
    return certificate(ours, theirs, sample, what.model, {"dtype": what.dtype, **_facts(checkpoint, config)})


def _outputs_of_ranks(checkpoint: Path, degree: int, sample: dict[str, torch.Tensor], dtype: str
                      ) -> dict[str, torch.Tensor]:
    """What the model makes of the sample at its own tensor degree, on so many ranks of this machine."""
    from safetensors.torch import load_file, save_file

    from launchers.local.ranks_here import run_ranks

    with tempfile.TemporaryDirectory(prefix="trainyard-export-") as folder:
        inputs, outputs = Path(folder, "inputs.safetensors"), Path(folder, "outputs.safetensors")
        save_file(sample, inputs)
        code = run_ranks([sys.executable, "-m", "pretrain.hf.measure_rank", str(checkpoint), str(inputs),
                          str(outputs), dtype], degree, Path(folder))
        if code:
            raise ConversionError(f"{checkpoint}: the training model could not be run on {degree} ranks of this "
                                  "machine to measure it; export with --no-certificate to leave that out")
        return load_file(outputs)


# -- import ------------------------------------------------------------------------------------------------------------


def import_(args: argparse.Namespace) -> int:
    """Write the run folder and say how to go on. Returns the exit code."""
    _must_be_new(args.to)
    from parallel.single_rank import single_rank
    from pretrain.hf.import_folder import write_run
    from pretrain.hf.read_folder import HFFolder
    from pretrain.models.build import global_shapes

    source = HFFolder(args.folder)
    with single_rank() as groups:
        source.bind(global_shapes(source.model, groups))
    source.check_repeated()
    config = _config(source, args.to)
    checkpoint = write_run(source, config, args.to, args.shard_size)
    sys.stdout.write(f"{checkpoint}: {source.architecture.model_type} as the family {source.family}, "
                     f"{config.spec.parameter_count(config.model):,} parameters\n")
    for note in source.notes():
        sys.stdout.write(f"note: {note}\n")
    sys.stdout.write(f"to go on training: trainyard train {args.to / 'config.yaml'} run.dir=... data.train=...\n")
    return ExitCode.DONE


def _config(source: HFFolder, to: Path) -> RunConfig:
    """A run that starts from the imported weights; how to train and on what is for the user to say."""
    values = {
        "run": {"dir": f"runs/from-{to.name}", "steps": 1000},
        "model": source.model.model_dump(),
        "objective": {"name": family_spec(source.family).objectives[0]},
        "data": {"train": "data/corpus/train"},
        "parallel": {"micro_batch": 1, "global_batch": 8},
        "optimizer": {"lr": 1e-4},
        "checkpoint": {"start_from": str(to)},
    }
    return config_from(values, str(source.folder))


def _must_be_new(to: Path) -> None:
    if to.exists():
        raise UserError(f"{to} exists already: choose another --to, or move it away")
