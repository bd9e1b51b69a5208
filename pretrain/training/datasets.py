"""Opens the dataset folder of a run as the kind of data that its model family reads."""

from __future__ import annotations

from typing import cast

from data_pipeline.image_text.pair_dataset import PairsDataset
from data_pipeline.samples import Dataset
from data_pipeline.tokens.token_dataset import TokenDataset
from pretrain.config.run_config import RunConfig
from pretrain.models.family import ImageTextModel


def open_dataset(config: RunConfig, folder: str) -> Dataset:
    """The dataset in `folder`. Raises DataError when it is not a finished dataset of that kind."""
    if config.spec.reads == "pairs":
        return PairsDataset.open(folder, cast(ImageTextModel, config.model).image_size)
    return TokenDataset.open(folder)
