"""Numbers and names as messages say them."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


def count(number: int, noun: str) -> str:
    """`1 rank`, `2 ranks`, `12,345 ranks`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def either(options: Iterable[object]) -> str:
    """`2 or 4`."""
    return " or ".join(map(str, options))


def listed(items: Iterable[object]) -> str:
    """`1, 2, 4`."""
    return ", ".join(map(str, items))


def nearest(name: str, names: Sequence[str]) -> str | None:
    """The one of `names` that `name` was probably meant to be."""
    return next(iter(get_close_matches(name, names, n=1, cutoff=0.6)), None)


def duration(seconds: float) -> str:
    """`12 s`, `3 min 05 s`, `2 h 07 min`, `4 d 06 h`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86_400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86_400} d {whole % 86_400 // 3600:02d} h"


def short_number(number: float) -> str:
    """`950`, `12.3 k`, `124 M`, `175 B`: three digits."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{float(f'{number / size:.3g}'):g} {unit}"
    return f"{number:g}"
