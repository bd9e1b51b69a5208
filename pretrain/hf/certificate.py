"""The proof of an exported folder: sample inputs through the training model and through transformers' own class.

The training model runs at its own tensor degree, on ranks of this machine, and each side in a process that then lets go
of it. Differences are of logits in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parallel.process_groups import Groups
from parallel.tensor_parallel import TensorParallel
from parallel.tensor_slice import SliceRange
from pretrain.checkpoint.manifest import package_versions
from pretrain.models import family_spec
from pretrain.models.build import filled_stage
from pretrain.models.family import FamilyConfig
from pretrain.models.hf_map import Architecture

Tensors = dict[str, Tensor]

SEED, NUM_SAMPLES, MAX_TOKENS = 20240607, 3, 192
# Of the largest logit, or absolute where all are below 1: sums are in another order on the two sides.
BOUND = 1e-5


def sample_inputs(model: FamilyConfig, architecture: Architecture, end_id: int | None, multiple: int) -> Tensors:
    """Random inputs of the model's form, some of them padded at their end.

    Args:
        end_id: where a text tower pools; it stands once in every text then.
        multiple: what lengths are a multiple of (the tensor degree, for sequence parallelism).

    Returns: `ids` and `mask` int64 [b, s]; with an encoder-decoder also `decoder_ids` [b, t]; with segments `types`
    [b, s]; with a dual encoder `pixels` fp32 [b, 3, S, S] and `ends` int64 [b].
    """
    generator = torch.Generator().manual_seed(SEED)
    spec, pad = family_spec(model.family), architecture.pads_with(model)
    usable = torch.tensor([number for number in range(model.vocab_size) if number not in (pad, end_id)])

    def ids(longest: int) -> Tensor:
        length = max(multiple, min(longest, MAX_TOKENS) // multiple * multiple)
        return usable[torch.randint(len(usable), (NUM_SAMPLES, length), generator=generator)]

    found = {"ids": ids(model.sequence_length)}
    length = found["ids"].shape[1]
    lengths = torch.tensor([length - (length * number) // (NUM_SAMPLES + 1) for number in range(NUM_SAMPLES)])
    found["mask"] = (torch.arange(length) < lengths[:, None]).long()
    if pad is not None:
        found["ids"][found["mask"] == 0] = pad
    if spec.form == "encoder_decoder":
        found["decoder_ids"] = ids(model.num_targets)
    elif spec.form == "encoder":
        types = torch.randint(model.segment_types, (NUM_SAMPLES, 1), generator=generator)
        found["types"] = types.expand(-1, length).contiguous()
    elif spec.form == "dual_encoder":
        found["pixels"] = torch.randn(NUM_SAMPLES, 3, model.image_size, model.image_size, generator=generator)
        found["ends"] = lengths - 1
        found["ids"][torch.arange(NUM_SAMPLES), found["ends"]] = end_id
    return found


# -- the training model ------------------------------------------------------------------------------------------------


@torch.no_grad()
def training_outputs(model: FamilyConfig, groups: Groups, read: Callable[[SliceRange], Tensor], dtype: torch.dtype, *,
                     sample: Tensors) -> Tensors:
    """What the training model makes of a sample on the tensor axis of `groups`; the same on every rank of it.

    Args:
        read: gives the weights of a range; `dtype`: the type that they are rounded to first, as in the folder.

    Returns: `logits` [b, s, v] without padding of the vocabulary ([images, texts] for a dual encoder), and `pair` [b,
    2] where pairs of segments are judged.
    """
    device = torch.device("cpu")
    stage = filled_stage(model, groups, device, lambda wanted: read(wanted).to(dtype).float())
    outputs = stage.run(_training_inputs(model, sample))
    if family_spec(model.family).form == "dual_encoder":
        image, text = outputs[:2]
        return {"logits": image @ text.t()}
    logits, *pair = outputs if isinstance(outputs, tuple) else (outputs,)
    whole = TensorParallel(groups, device).gather_columns(logits).transpose(0, 1)[..., : model.vocab_size]
    return {"logits": whole.contiguous(), **({"pair": pair[0]} if pair else {})}


def _training_inputs(model: FamilyConfig, sample: Tensors) -> Tensor | tuple[Tensor, ...]:
    form = family_spec(model.family).form
    if form == "decoder":  # no token sees one that comes later, so padding at the end needs no mask
        return sample["ids"]
    if form == "encoder":
        length = sample["ids"].shape[1]
        everywhere = torch.arange(length).expand(len(sample["ids"]), -1).contiguous()
        return sample["ids"], sample["types"], everywhere, sample["mask"]
    if form == "encoder_decoder":
        return sample["ids"], sample["decoder_ids"], sample["mask"]
    return sample["pixels"], sample["ids"], sample["ends"]


# -- transformers ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def folder_outputs(folder: Path, architecture: Architecture, model: FamilyConfig, sample: Tensors) -> Tensors:
    """What transformers makes of a sample with the model in `folder`; as `training_outputs`.

    Raises:
        ValueError: transformers had to make up a tensor, or found no place for one.
    """
    with _silent() as transformers:
        loader = getattr(transformers, architecture.class_name(model))
        theirs, told = loader.from_pretrained(folder, dtype=torch.float32, local_files_only=True,
                                              output_loading_info=True)
    odd = {kind: sorted(map(str, names)) for kind, names in told.items() if names}
    if odd:
        raise ValueError(f"transformers loads the folder with {odd}")
    theirs.eval()
    form = family_spec(model.family).form
    if form == "decoder":
        outputs = theirs(input_ids=sample["ids"], attention_mask=sample["mask"])
    elif form == "encoder":
        outputs = theirs(input_ids=sample["ids"], attention_mask=sample["mask"], token_type_ids=sample["types"])
    elif form == "encoder_decoder":
        outputs = theirs(input_ids=sample["ids"], attention_mask=sample["mask"],
                         decoder_input_ids=sample["decoder_ids"])
    else:
        return {"logits": theirs(input_ids=sample["ids"], pixel_values=sample["pixels"]).logits_per_image}
    if "prediction_logits" in outputs:
        return {"logits": outputs.prediction_logits, "pair": outputs.seq_relationship_logits}
    return {"logits": outputs.logits}


@contextmanager
def _silent():
    """transformers without its progress bars and warnings, as it was before afterwards."""
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


def certificate(ours: Tensors, theirs: Tensors, sample: Tensors, model: FamilyConfig, facts: dict[str, Any]
                ) -> dict[str, Any]:
    """What goes into certificate.json; `within` says whether the two sides agree."""
    if family_spec(model.family).form in ("decoder", "encoder"):  # positions that are padding mean nothing
        real = sample["mask"].bool()
        ours, theirs = ({**found, "logits": found["logits"][real]} for found in (ours, theirs))
    differences = {name: float((ours[name] - theirs[name]).abs().max()) for name in ours}
    largest = max(float(found.abs().max()) for found in ours.values())
    bound = BOUND * max(1.0, largest)
    versions = {**package_versions(), "transformers": version("transformers")}
    return {
        "within": ours.keys() == theirs.keys() and all(found <= bound for found in differences.values()),
        "largest_differences": differences, "bound": bound, "largest_logit": largest,
        "inputs": {"seed": SEED, "shapes": {name: list(found.shape) for name, found in sample.items()}},
        **facts, "versions": versions,
    }
