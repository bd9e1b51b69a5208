"""The architectures, by name. A family's folder holds `spec.py`, `modules.py` (the only one with torch) and, where
transformers knows its models, `hf.py`."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from pretrain.models.family import FamilySpec
from pretrain.models.hf_adapter import HFAdapter
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


def families_with(**values: str) -> str:
    """Names of the families whose spec has these values, for a message."""
    names = [name for name in FAMILIES
             if all(getattr(family_spec(name), field) == value for field, value in values.items())]
    return ", ".join(names)


def hf_adapter(family: str) -> HFAdapter:
    """A family's side of the exchange with transformers. Raises ModuleNotFoundError for a family without `hf.py`."""
    return import_module(f"{FAMILIES[family]}.hf").ADAPTER


def architectures(family: str) -> tuple[Architecture, ...]:
    """The architectures of transformers that a family's models can be written as; () for none."""
    return hf_adapter(family).architectures if find_spec(f"{FAMILIES[family]}.hf") else ()
