"""The stages between a pair of image and caption and a batch, for the objectives in pairs_spec.py."""

from __future__ import annotations

from data_pipeline.image_text.pair_dataset import PairsDataset
from pretrain.models.family import FamilyConfig
from pretrain.objectives.objective import ObjectiveConfig


def as_they_are(config: ObjectiveConfig, model: FamilyConfig, dataset: PairsDataset, seed: int | str,
                 special: object) -> list:
    """The dataset crops images and tokenizes captions itself."""
    return []
