"""A trained model on one process: found, loaded whole from any layout's checkpoint, ready to be called."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import torch

from data_pipeline.manifest import TOKENIZER_FILE
from data_pipeline.tokenizer import Tokenizer
from parallel.initialise import slice_of
from parallel.layout import Layout
from parallel.megatron import Groups, TensorShard, build_groups, destroy_groups
from parallel.pipeline import Stage
from parallel.rank_info import alone
from parallel.rendezvous import join, leave
from pretrain.checkpoint.manifest import PREFIX, CheckpointError
from pretrain.checkpoint.store import Checkpoint, newest_whole
from pretrain.config import RunConfig, config_from
from pretrain.errors import UserError
from pretrain.models import FAMILIES


@contextmanager
def single_rank() -> Iterator[Groups]:
    """A world of this process alone, without DeepSpeed; nothing listens, and no later start believes in a launcher."""
    join(alone(), exports=False)
    try:
        yield build_groups(Layout())
    finally:
        destroy_groups()
        leave()


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at a run folder (its newest whole one), at its `checkpoints` folder, or at one step's folder.

    Raises:
        UserError: there is none, or it is damaged.
    """
    try:
        if path.name.startswith(PREFIX):
            return Checkpoint(path)
        folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
        checkpoint, _ = newest_whole(folder)
    except CheckpointError as error:
        raise UserError(str(error)) from None
    if checkpoint is None:
        raise UserError(f"{path}: no checkpoint here. Give a run folder, or one of its checkpoints/{PREFIX}NNNNNNNN")
    return checkpoint


def load_model(checkpoint: Checkpoint, groups: Groups) -> tuple[RunConfig, Stage]:
    """The whole model in fp32 on this process, in evaluation mode, with its config."""
    config = config_from(checkpoint.manifest["config"], str(checkpoint.folder))
    modules = import_module(f"{FAMILIES[config.model.family]}.modules")
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    specs = modules.layers(config.model, TensorShard(groups, device))
    stage = Stage(specs, 0, len(specs))
    with torch.no_grad():
        for name, tensor, slice_dim in stage.named_global_tensors():
            tensor.copy_(slice_of(checkpoint.tensor(name), slice_dim, 0, 1))
    return config, stage.eval()


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer that travels with the checkpoint."""
    return Tokenizer.load(checkpoint.folder / TOKENIZER_FILE)
