"""Slurm's compressed forms, expanded without calling scontrol: node lists and tasks-per-node lists."""

import itertools
import re

from common.errors import UserError

MAX_NODES = 100_000


class NodeListError(UserError):
    """The text is not a node list."""


def expand_node_list(text: str) -> list[str]:
    """Node names of a Slurm node list in its order: ``n[1-3,07],m2`` -> n1 n2 n3 n07 m2.

    Numbers keep their zero padding, a name may carry several brackets (``r[1-2]n[1-2]``) and a suffix.
    Raises NodeListError when the text is not such a list.
    """
    names = []
    for part in _split_outside_brackets(text):
        names.extend(_expand_part(part, text))
        if len(names) > MAX_NODES:
            raise NodeListError(f"node list {text[:80]!r} has more than {MAX_NODES} names")
    return names


def expand_tasks_per_node(text: str) -> list[int]:
    """Tasks of every node, from Slurm's short form: ``2(x3),1`` -> [2, 2, 2, 1]. Raises NodeListError."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,6})(?:\(x(\d{1,6})\))?", part.strip())
        if not match:
            raise NodeListError(f"{text[:80]!r} is not a list of tasks per node such as 2(x3),1")
        counts.extend([int(match[1])] * int(match[2] or 1))
    return counts


def _split_outside_brackets(text: str) -> list[str]:
    parts, depth, start = [], 0, 0
    for index, character in enumerate(text):
        depth += (character == "[") - (character == "]")
        if depth not in (0, 1):
            break
        if character == "," and depth == 0:
            parts.append(text[start:index])
            start = index + 1
    if depth != 0:
        raise NodeListError(f"node list {text[:80]!r} has brackets that do not match")
    parts.append(text[start:])
    return parts


def _expand_part(part: str, whole: str) -> list[str]:
    pieces = re.split(r"\[([^\]]*)\]", part)
    if not re.fullmatch(r"[A-Za-z0-9_.:-]*", "".join(pieces[::2])) or not part:
        raise NodeListError(f"node list {whole[:80]!r}: {part[:80]!r} is not a node name")
    choices = [[piece] if index % 2 == 0 else _expand_ranges(piece, whole) for index, piece in enumerate(pieces)]
    return ["".join(combination) for combination in itertools.product(*choices)]


def _expand_ranges(ranges: str, whole: str) -> list[str]:
    numbers: list[str] = []
    for one in ranges.split(","):
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", one)
        if not match:
            raise NodeListError(f"node list {whole[:80]!r}: {one[:40]!r} is not a number or a range")
        first, last = match[1], match[2] or match[1]
        if int(last) < int(first) or int(last) - int(first) >= MAX_NODES:
            raise NodeListError(f"node list {whole[:80]!r}: the range {one} is empty or too long")
        numbers.extend(str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    return numbers
