"""A trained model on one process: found, loaded whole from any layout's checkpoint, ready to be called."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from data_pipeline.corruption.special_ids import GivenIds, SpecialIds
from data_pipeline.folder.manifest import TOKENIZER_FILE
from data_pipeline.text.tokenizer import TextTokenizer, Tokenizer
from parallel.pipeline_stages import Stage
from parallel.process_groups import Groups
from pretrain.checkpoint.locate import require_checkpoints
from pretrain.checkpoint.reader import Checkpoint
from pretrain.checkpoint.store import newest_whole
from pretrain.config.run_config import RunConfig, config_from
from pretrain.hf.read_folder import HFFolder, is_hf_folder
from pretrain.hf.tokenizer_import import HFTokenizer
from pretrain.models import family_spec
from pretrain.models.build import filled_stage, global_shapes
from pretrain.models.family import FamilyConfig, FamilySpec
from pretrain.objectives import OBJECTIVES
from pretrain.objectives.objective import ObjectiveConfig


@dataclass(frozen=True)
class Trained:
    """A model in evaluation mode, and what texts have to become for it.

    `step` is None where nobody says how long it was trained; `special` are the ids its objective has beside those of
    the tokenizer.
    """

    folder: Path
    step: int | None
    model: FamilyConfig
    objective: ObjectiveConfig
    stage: Stage
    tokenizer: TextTokenizer
    special: SpecialIds | GivenIds

    @property
    def spec(self) -> FamilySpec:
        return family_spec(self.model.family)

    @property
    def device(self) -> torch.device:
        return next(self.stage.parameters()).device


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at a run folder (its newest whole one), at its `checkpoints` folder, or at one step's folder.

    Raises:
        UserError: there is none.
        CheckpointError: it is damaged.
    """
    require_checkpoints(path)
    checkpoint, _ = newest_whole(path)
    return checkpoint


def open_model(path: Path, groups: Groups) -> Trained:
    """The model at a run folder, at a checkpoint of any layout, or at a transformers folder.

    Of a transformers folder the objective is the family's usual one with its usual settings.

    Raises:
        UserError: there is none, or a tokenizer is missing.
        CheckpointError, HFError: it is damaged.
    """
    if is_hf_folder(path):
        return _open_hf(path, groups)
    checkpoint = open_checkpoint(path)
    config, stage = load_model(checkpoint, groups)
    step, imported = checkpoint.manifest["step"], checkpoint.manifest.get("imported")
    if imported:  # it still has the tokenizer of where it was trained
        theirs = HFTokenizer(checkpoint.folder, imported["architecture"], config.spec)
        special = theirs.special(config.objective, config.model)
        return Trained(checkpoint.folder, step, config.model, config.objective, stage, theirs, special)
    return Trained(checkpoint.folder, step, config.model, config.objective, stage, load_tokenizer(checkpoint),
                   SpecialIds(config.model.vocab_size))


def _open_hf(path: Path, groups: Groups) -> Trained:
    folder = HFFolder(path)
    spec = family_spec(folder.family)
    objective = OBJECTIVES[spec.objectives[0]].config_class()
    tokenizer = HFTokenizer(path, folder.architecture.model_type, spec)
    special = tokenizer.special(objective, folder.model)
    folder.bind(global_shapes(folder.model, groups))
    folder.check_repeated()
    stage = filled_stage(folder.model, groups, _device(), folder.read_range)
    return Trained(path, None, folder.model, objective, stage, tokenizer, special)


def load_model(checkpoint: Checkpoint, groups: Groups) -> tuple[RunConfig, Stage]:
    """The whole model in fp32 on this process, in evaluation mode, with its config."""
    config = config_from(checkpoint.manifest["config"], str(checkpoint.folder))
    return config, filled_stage(config.model, groups, _device(), checkpoint.read)


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer that travels with the checkpoint of a run."""
    return Tokenizer.load_copy(checkpoint.folder / TOKENIZER_FILE)


def _device() -> torch.device:
    return torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
