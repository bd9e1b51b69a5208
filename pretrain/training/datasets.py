"""The dataset folder of a run, opened as its family reads it."""

from __future__ import annotations

from data_pipeline.image_text.pair_dataset import PairsDataset
from data_pipeline.loader import Dataset
from data_pipeline.tokens.token_dataset import TokenDataset
from pretrain.config.run_config import RunConfig


def open_dataset(config: RunConfig, folder: str) -> Dataset:
    """Raises DataError when the folder is not a finished dataset of the kind that the family reads."""
    if config.spec.reads == "pairs":
        return PairsDataset.open(folder, config.model.image_size)
    return TokenDataset.open(folder)
