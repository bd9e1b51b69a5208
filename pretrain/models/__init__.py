"""The architectures, by name. A family's folder holds `spec.py` (facts) and `modules.py` (torch)."""

from importlib import import_module

from pretrain.models.family import FamilySpec

FAMILIES = {
    "gpt": "pretrain.models.gpt",
    "t5": "pretrain.models.t5",
    "bart": "pretrain.models.bart",
    "bert": "pretrain.models.bert",
    "clip": "pretrain.models.clip",
}


def family_spec(family: str) -> FamilySpec:
    """The facts of a family; no torch. Raises KeyError for a name that is not in FAMILIES."""
    return import_module(f"{FAMILIES[family]}.spec").SPEC
