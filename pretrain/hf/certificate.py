"""The proof of an exported folder: sample inputs through the training model and through transformers' own class.

The training model runs at its own tensor degree, on ranks of this machine. Each side is built, run and released before
the other. Differences are of logits in fp32. The family's adapter chooses the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parallel.pipeline_stages import Stage
from parallel.process_groups import Groups
from parallel.tensor_parallel import TensorParallel
from parallel.tensor_slice import SliceRange
from pretrain.checkpoint.manifest import package_versions
from pretrain.hf.random_inputs import SEED, SeededInputs
from pretrain.models import hf_adapter
from pretrain.models.build import filled_stage
from pretrain.models.family import FamilyConfig
from pretrain.models.hf_adapter import Tensors
from pretrain.models.hf_map import Architecture

# Of the largest logit, or absolute where all are below 1: sums are in another order on the two sides.
BOUND = 1e-5


def sample_inputs(model: FamilyConfig, architecture: Architecture, end_id: int | None, multiple: int) -> Tensors:
    """Random inputs for both sides, some of them padded at their end; the same on every call.

    Args:
        end_id: the id that ends a text.
        multiple: lengths are a multiple of it (the tensor degree, for sequence parallelism).
    """
    return hf_adapter(model.family).sample(model, SeededInputs(model, architecture, end_id, multiple))


# -- the training model ------------------------------------------------------------------------------------------------


class _SlicedModel:
    """A stage on the tensor axis of some ranks, as an adapter runs it (`pretrain.models.hf_adapter.TrainingModel`)."""

    def __init__(self, stage: Stage, tp: TensorParallel, vocab_size: int) -> None:
        self.stage, self.tp, self.vocab_size = stage, tp, vocab_size

    def run(self, inputs: Tensor | tuple[Tensor, ...]) -> Any:
        return self.stage.run(inputs)

    def logits(self, columns: Tensor) -> Tensor:
        # over the tensor group, whose ranks hold a slice of the vocabulary each
        return self.tp.gather_columns(columns).transpose(0, 1)[..., : self.vocab_size]


@torch.no_grad()
def training_outputs(model: FamilyConfig, groups: Groups, read: Callable[[SliceRange], Tensor], dtype: torch.dtype, *,
                     sample: Tensors) -> Tensors:
    """Logits of the training model for a sample, on the tensor axis of `groups`; the same on every rank of it.

    Args:
        read: gives the weights of a range.
        dtype: the type that they are rounded to first, as in the folder.

    Returns: what the family's adapter compares, fp32.
    """
    device = torch.device("cpu")
    stage = filled_stage(model, groups, device, lambda wanted: read(wanted).to(dtype).float())
    sliced = _SlicedModel(stage, TensorParallel(groups, device), model.vocab_size)
    return {name: logits.contiguous() for name, logits in hf_adapter(model.family).ours(sample, sliced).items()}


# -- transformers ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def folder_outputs(folder: Path, architecture: Architecture, model: FamilyConfig, sample: Tensors) -> Tensors:
    """Logits of transformers for a sample, from the model in `folder`; as `training_outputs`.

    Raises:
        ValueError: transformers had to draw a tensor that the folder lacks, or left one of the folder out.
    """
    with _silent() as transformers:
        loader = getattr(transformers, architecture.class_name(model))
        theirs, report = loader.from_pretrained(folder, dtype=torch.float32, local_files_only=True,
                                                output_loading_info=True)
    odd = {kind: sorted(map(str, names)) for kind, names in report.items() if names}
    if odd:
        raise ValueError(f"transformers loads the folder with {odd}")
    return hf_adapter(model.family).theirs(sample, theirs.eval())


@contextmanager
def _silent() -> Iterator[Any]:
    """transformers without its progress bars and warnings, which are set back afterwards."""
    import transformers
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield transformers
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


# -- the certificate ---------------------------------------------------------------------------------------------------


def certificate(ours: Tensors, theirs: Tensors, sample: Tensors, details: dict[str, Any]) -> dict[str, Any]:
    """The content of certificate.json; `within` is whether the two sides agree. `details` go into it as they are."""
    differences = {name: float((ours[name] - theirs[name]).abs().max()) for name in ours}
    largest = max(float(found.abs().max()) for found in ours.values())
    bound = BOUND * max(1.0, largest)
    versions = {**package_versions(), "transformers": version("transformers")}
    return {
        "within": ours.keys() == theirs.keys() and all(found <= bound for found in differences.values()),
        "largest_differences": differences, "bound": bound, "largest_logit": largest,
        "inputs": {"seed": SEED, "shapes": {name: list(found.shape) for name, found in sample.items()}},
        **details, "versions": versions,
    }
