"""OBJECTIVES: the one table from the name in a config to an objective. No torch; a loss is loaded when asked for."""

from importlib import import_module
from typing import Any

from data_pipeline.corruption.noise_seed import NoiseSeed
from data_pipeline.corruption.special_ids import SpecialIds
from pretrain.models import family_spec
from pretrain.models.family import FamilyConfig
from pretrain.objectives import pairs_spec, text_spec
from pretrain.objectives.objective import ObjectiveConfig, ObjectiveSpec, StageInputs

OBJECTIVES: dict[str, ObjectiveSpec[Any, Any]] = {**text_spec.SPECS, **pairs_spec.SPECS}


def make_loss(config: ObjectiveConfig, model: FamilyConfig, tp: object) -> Any:
    """The `parallel.objective.Objective` for the form of the model's family, on the tensor axis; imports torch."""
    return _load(OBJECTIVES[config.name].losses[family_spec(model.family).form])(config, model, tp)


def make_stages(config: ObjectiveConfig, model: FamilyConfig, dataset: object, seed: NoiseSeed, *,
                special: SpecialIds | None = None) -> list:
    """The webdataset stages that turn windows of an open dataset into the fields of a batch.

    seed: that of the noise; HELDOUT for data whose noise no run may change.
    special: the ids of special tokens; None: at the top of the vocabulary, as in every model trained here.
    """
    spec = OBJECTIVES[config.name]
    return _load(spec.stages)(StageInputs(
        config=config, model=model, dataset=dataset, window_tokens=spec.window_tokens(config, model), seed=seed,
        special=special or SpecialIds.at_top(model.vocab_size)))


def _load(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)
