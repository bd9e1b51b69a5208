"""A trained model on one process, loaded whole from a checkpoint of any layout or from a transformers folder."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from pathlib import Path

import torch

from data_pipeline.corruption.special_ids import SpecialIds
from data_pipeline.folder.manifest import TOKENIZER_FILE
from data_pipeline.text.tokenizer import TextTokenizer, Tokenizer
from parallel.pipeline_stages import Stage
from parallel.process_groups import Groups
from pretrain.checkpoint.open_checkpoint import open_checkpoint
from pretrain.checkpoint.reader import Checkpoint
from pretrain.config.run_config import RunConfig, config_from
from pretrain.hf.read_folder import HFFolder, is_hf_folder
from pretrain.hf.tokenizer_import import HFTokenizer
from pretrain.models import family_spec, hf_adapter
from pretrain.models.build import filled_stage, global_shapes
from pretrain.models.family import FamilyConfig, FamilySpec
from pretrain.objectives import OBJECTIVES
from pretrain.objectives.objective import ObjectiveConfig


@dataclass(frozen=True)
class Trained:
    """A model in evaluation mode with its tokenizer.

    Args:
        step: how long it was trained; None for a transformers folder, where that is not known.
        special: the special ids of its objective.
    """

    folder: Path
    step: int | None
    model: FamilyConfig
    objective: ObjectiveConfig
    _: KW_ONLY
    stage: Stage
    tokenizer: TextTokenizer
    special: SpecialIds

    @property
    def spec(self) -> FamilySpec:
        return family_spec(self.model.family)

    @property
    def device(self) -> torch.device:
        return next(self.stage.parameters()).device


def open_model(path: Path, groups: Groups) -> Trained:
    """The model at a run folder, at a checkpoint of any layout, or at a transformers folder.

    The objective of a transformers folder is the family's first one with its default settings.

    Raises:
        UserError: there is none, or a tokenizer is missing.
        CheckpointError, HFError: it is damaged.
    """
    if is_hf_folder(path):
        return _open_hf(path, groups)
    checkpoint = open_checkpoint(path)
    config, stage = load_model(checkpoint, groups)
    step, imported = checkpoint.manifest["step"], checkpoint.manifest.get("imported")
    tokenizer: TextTokenizer
    if imported:  # it came with the tokenizer of another project
        tokenizer = HFTokenizer(checkpoint.folder, imported["architecture"], hf_adapter(config.model.family))
        special = tokenizer.special(config.objective, config.model)
    else:
        tokenizer = Tokenizer.load_copy(checkpoint.folder / TOKENIZER_FILE)
        special = SpecialIds.at_top(config.model.vocab_size)
    return Trained(checkpoint.folder, step, config.model, config.objective, stage=stage, tokenizer=tokenizer,
                   special=special)


def _open_hf(path: Path, groups: Groups) -> Trained:
    folder = HFFolder(path)
    objective = OBJECTIVES[family_spec(folder.family).objectives[0]].config_class()
    tokenizer = HFTokenizer(path, folder.architecture.model_type, hf_adapter(folder.family))
    special = tokenizer.special(objective, folder.model)
    folder.bind(global_shapes(folder.model, groups))
    folder.check_repeated()
    stage = filled_stage(folder.model, groups, _device(), folder.read_range)
    return Trained(path, None, folder.model, objective, stage=stage, tokenizer=tokenizer, special=special)


def load_model(checkpoint: Checkpoint, groups: Groups) -> tuple[RunConfig, Stage]:
    """The whole model in fp32 on this process, in evaluation mode, with its config."""
    config = config_from(checkpoint.manifest["config"], str(checkpoint.folder))
    return config, filled_stage(config.model, groups, _device(), checkpoint.read)


def _device() -> torch.device:
    return torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
