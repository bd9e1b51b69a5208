"""The architectures, by name. A family's folder holds `spec.py`, `modules.py` (the only one with torch) and, where
transformers knows its models, `hf.py`."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from pretrain.models.family import FamilySpec
from pretrain.models.hf_map import Architecture

FAMILIES = {
    "gpt": "pretrain.models.gpt",
    "t5": "pretrain.models.t5",
    "bart": "pretrain.models.bart",
    "bert": "pretrain.models.bert",
    "clip": "pretrain.models.clip",
}


def family_spec(family: str) -> FamilySpec[Any]:
    """What is known of a family without torch. Raises KeyError for a name that is not in FAMILIES."""
    spec: FamilySpec[Any] = import_module(f"{FAMILIES[family]}.spec").SPEC
    return spec


def architectures(family: str) -> tuple[Architecture, ...]:
    """How a family's models lie in a transformers folder; none for a family that transformers does not know."""
    module = f"{FAMILIES[family]}.hf"
    return import_module(module).ARCHITECTURES if find_spec(module) else ()
