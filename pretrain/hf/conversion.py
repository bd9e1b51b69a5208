"""A checkpoint as a transformers folder, and a transformers folder as a run folder with one checkpoint.

Both functions build a world of this one process, so they run in a process that is not a rank of a run: a command, a
notebook, or the child process of a hook.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import ConfigError, ConversionError, UserError
from common.files import sha256_of
from data_pipeline.folder.manifest import TOKENIZER_FILE
from data_pipeline.text.tokenizer import Tokenizer
from parallel.precision import DTYPES
from parallel.process_groups import Groups
from parallel.single_rank import single_rank
from pretrain.checkpoint.manifest import MANIFEST
from pretrain.checkpoint.open_checkpoint import open_checkpoint
from pretrain.checkpoint.reader import Checkpoint
from pretrain.config.run_config import RunConfig, config_from
from pretrain.hf.certificate import certificate, folder_outputs, sample_inputs, training_outputs
from pretrain.hf.config_json import choose_architecture, token_ids_of
from pretrain.hf.export_folder import Export, check_new, write_export
from pretrain.hf.import_folder import TOKENIZER_FILES, starting_config, write_run
from pretrain.hf.measure_rank import outputs_of_ranks
from pretrain.hf.read_folder import HFFolder
from pretrain.hf.tokenizer_export import export_tokenizer
from pretrain.models.build import global_shapes

DEFAULT_FILE_BYTES = 2 * 10**9
NOT_MEASURED = "not measured, as asked: --no-certificate"


class Exported(NamedTuple):
    """A transformers folder that was written."""

    class_name: str  # the class of transformers that loads it
    step: int  # of the checkpoint
    certificate: dict[str, Any]  # the content of certificate.json


class Imported(NamedTuple):
    """A run folder that was written."""

    checkpoint: Path
    family: str
    model_type: str
    num_parameters: int
    notes: list[str]  # settings of the transformers folder that were dropped


# -- export ------------------------------------------------------------------------------------------------------------


def export(checkpoint: Path, to: Path, *, architecture: str | None = None, dtype: str = "fp32",
           file_bytes: int = DEFAULT_FILE_BYTES, with_tokenizer: bool = True, is_measured: bool = True) -> Exported:
    """Write a checkpoint as a new folder `to` that transformers loads.

    Args:
        checkpoint: a run folder, whose newest whole checkpoint is taken, or the folder of one step.
        architecture: the model_type to write; None: that of an imported model, else the first that fits.
        dtype: number format of the weights: fp32, bf16 or fp16.
        file_bytes: the most bytes of a file that holds more than one tensor.
        is_measured: compare logits of the training model and of transformers, and write nothing when they differ.

    Raises:
        UserError: there is no such checkpoint or architecture, or `to` exists.
        CheckpointError: the checkpoint is damaged.
        ConfigError: the architecture has no counterpart for values of the model.
        ConversionError: transformers does not load the folder, or the logits differ.
        StorageError: the disk refused.
    """
    check_new(to)
    with single_rank() as groups:
        opened = open_checkpoint(checkpoint)
        config = config_from(opened.manifest["config"], str(opened.folder))
        plan = _plan(opened, config, groups, architecture=architecture, dtype=dtype, file_bytes=file_bytes,
                     with_tokenizer=with_tokenizer)

        def certify(folder: Path) -> dict[str, Any]:
            if not is_measured:
                return {"within": True, "largest_differences": None, "why": NOT_MEASURED, **_origin(opened, config)}
            return _measured(plan, folder, opened, config, groups=groups)

        found = write_export(plan, to, certify)
    return Exported(plan.architecture.class_name(plan.model), opened.manifest["step"], found)


def _plan(checkpoint: Checkpoint, config: RunConfig, groups: Groups, *, architecture: str | None, dtype: str,
          file_bytes: int, with_tokenizer: bool) -> Export:
    """The export that was asked for. Raises ConfigError with values that the architecture has no counterpart for."""
    family = config.model.family
    asked = architecture or checkpoint.manifest.get("imported", {}).get("architecture")
    try:
        chosen, problems = choose_architecture(family, config.model, asked)
    except LookupError as error:
        raise UserError(f"--architecture {asked}: the family {family} can be written as {error}") from None
    if problems:
        raise ConfigError(problems, f"{checkpoint.folder} as {chosen.model_type}")
    write_tokenizer, token_ids = _tokenizer(checkpoint, config)
    return Export(config.model, global_shapes(config.model, groups), checkpoint.tensor, chosen, token_ids=token_ids,
                  dtype=dtype, file_bytes=file_bytes, write_tokenizer=write_tokenizer if with_tokenizer else None)


def _tokenizer(checkpoint: Checkpoint, config: RunConfig) -> tuple[Callable[[Path], None], dict[str, int | None]]:
    """A function that writes the tokenizer's files into a folder, and the token ids of config.json.

    An imported model keeps the files that it came with.
    """

    def copy_files(folder: Path) -> None:
        for source in map(checkpoint.folder.joinpath, TOKENIZER_FILES):
            if source.is_file():
                shutil.copyfile(source, folder / source.name)

    if "imported" in checkpoint.manifest:
        return copy_files, checkpoint.manifest["imported"]["token_ids"]
    tokenizer = Tokenizer.load_copy(checkpoint.folder / TOKENIZER_FILE)
    return partial(export_tokenizer, tokenizer, config), token_ids_of(config, tokenizer.end_of_text)


def _origin(checkpoint: Checkpoint, config: RunConfig) -> dict[str, Any]:
    """The fields of certificate.json that say which checkpoint was exported and how it was laid out."""
    return {"layout": {"tensor": config.parallel.tensor, "sequence": config.parallel.sequence},
            "checkpoint": {"step": checkpoint.manifest["step"],
                           "manifest_sha256": sha256_of(checkpoint.folder / MANIFEST)}}


def _measured(plan: Export, folder: Path, checkpoint: Checkpoint, config: RunConfig, *, groups: Groups
              ) -> dict[str, Any]:
    """The certificate of a folder: the training model at its own tensor degree beside transformers."""
    degree = config.parallel.tensor
    sample = sample_inputs(plan.model, plan.architecture, plan.token_ids.get("eos_token_id"), degree)
    if degree > 1:
        ours = outputs_of_ranks(checkpoint.folder, degree, sample, plan.dtype)
    else:
        ours = training_outputs(plan.model, groups, checkpoint.read, DTYPES[plan.dtype], sample=sample)
    try:
        theirs = folder_outputs(folder, plan.architecture, plan.model, sample)
    except ImportError:
        raise UserError("the certificate needs transformers: pip install 'trainyard[hf]', or leave the measurement out "
                        "with --no-certificate") from None
    except (ValueError, RuntimeError, KeyError) as error:
        raise ConversionError(f"transformers does not load the exported folder: {error}. This is a defect in the name "
                              f"map of {plan.architecture.model_type}") from None
    return certificate(ours, theirs, sample, {"dtype": plan.dtype, **_origin(checkpoint, config)})


# -- import ------------------------------------------------------------------------------------------------------------


def import_folder(hf_dir: Path, to: Path, *, file_bytes: int = DEFAULT_FILE_BYTES) -> Imported:
    """Write a new run folder `to` with the weights of a transformers folder and a config.yaml that starts from them.

    Args:
        file_bytes: the most bytes of a file that holds more than one tensor.

    Raises:
        HFError: the folder is damaged, or holds a model that cannot be built here.
        UserError: `to` exists.
        StorageError: the disk refused.
    """
    check_new(to)
    source = HFFolder(hf_dir)
    with single_rank() as groups:
        source.bind(global_shapes(source.model, groups))
    source.check_repeated()
    config = starting_config(source, to)
    checkpoint = write_run(source, config, to, file_bytes)
    return Imported(checkpoint, source.family, source.architecture.model_type,
                    config.spec.parameter_count(config.model), source.notes())
