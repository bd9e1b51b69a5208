"""The architectures, by name. A family's folder holds `spec.py` (no torch), `modules.py` (torch) and, where
transformers has its models, `hf.py` (no torch)."""

from importlib import import_module
from importlib.util import find_spec

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


def family_spec(family: str) -> FamilySpec:
    """The facts of a family; no torch. Raises KeyError for a name that is not in FAMILIES."""
    return import_module(f"{FAMILIES[family]}.spec").SPEC


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
