"""The objectives on pairs of image and caption (no torch)."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from common.errors import Problem
from pretrain.models.family import SequenceModel
from pretrain.objectives.objective import END_OF_TEXT_ROLE, ObjectiveConfig, ObjectiveSpec, SpecialTokens

STAGES = "pretrain.objectives.pairs_stages:unchanged"


class ContrastiveConfig(ObjectiveConfig):
    """Finds each image's caption among all of the global batch, and each caption's image (Radford et al. 2021)."""

    name: Literal["contrastive"] = Field("contrastive", description="the objective")


class SigLIPConfig(ObjectiveConfig):
    """Says of every image and caption of the global batch whether they belong together (Zhai et al. 2023)."""

    name: Literal["siglip"] = Field("siglip", description="the objective")


def _problems(config: ObjectiveConfig, model: SequenceModel) -> Iterator[Problem]:
    if model.sequence_length < 2:
        yield Problem("model.sequence_length", f"captions of {model.sequence_length} token",
                      "at least 2: text and end-of-text", "set model.sequence_length=2 or more")


def _spec(config_class: type[ObjectiveConfig], loss: str) -> ObjectiveSpec[ObjectiveConfig, SequenceModel]:
    return ObjectiveSpec(
        config_class, {"dual_encoder": f"pretrain.objectives.contrastive:{loss}"}, STAGES,
        problems=_problems, special=SpecialTokens(after=(END_OF_TEXT_ROLE,)))


SPECS = {"contrastive": _spec(ContrastiveConfig, "Contrastive"), "siglip": _spec(SigLIPConfig, "SigLIP")}
