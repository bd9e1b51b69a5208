"""OBJECTIVES: the one table from the name in a config to an objective. Facts only; a loss is loaded when asked for."""

from importlib import import_module

from data_pipeline.corruption.special_ids import SpecialIds
from pretrain.models import family_spec
from pretrain.models.family import FamilyConfig
from pretrain.objectives import pairs_spec, text_spec
from pretrain.objectives.objective import ObjectiveConfig, ObjectiveSpec

HELDOUT_SEED = "heldout"

OBJECTIVES: dict[str, ObjectiveSpec] = {**text_spec.SPECS, **pairs_spec.SPECS}


def make_loss(name: str, family: str, tp: object) -> object:
    """The loss of an objective for the form of a family, on the tensor axis; imports torch."""
    return _load(OBJECTIVES[name].losses[family_spec(family).form])(tp)


def make_stages(config: ObjectiveConfig, model: FamilyConfig, dataset: object, seed: int | str,
                special: SpecialIds | None = None) -> list:
    """The webdataset stages that turn windows of an open dataset into the fields of a batch.

    seed: that of the noise; HELDOUT_SEED for data whose noise no run may change.
    special: where the objective's own ids lie; None: at the top of the vocabulary, as in every model trained here.
    """
    special = special or SpecialIds.at_top(model.vocab_size)
    return _load(OBJECTIVES[config.name].stages)(config, model, dataset, seed, special)


def _load(path: str) -> object:
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)
