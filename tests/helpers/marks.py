"""Marks of cases, in the places of their parameters."""

from collections.abc import Sequence
from typing import Any

import pytest


def slow_after(number: int, cases: Sequence[Any]) -> list[Any]:
    """The first `number` cases as they are; the others are left out of `make quick`."""
    rest = [case if isinstance(case, tuple) else (case,) for case in cases[number:]]
    return [*cases[:number], *(pytest.param(*case, marks=pytest.mark.slow) for case in rest)]
