"""What a pass over somebody's files leaves out: a count for each reason, and where it happened first."""

from collections import Counter
from dataclasses import dataclass, field

from common.wording import count

MAX_EXAMPLE_CHARACTERS = 300


@dataclass
class LeftOut:
    """Counts by reason, with one example for each: the name, the line or row, and what was found there.

    `kept` counts what is used although it is unusual. `damaged` has a line for every damaged tar, of which only what
    stands before the damage was read.
    """

    counts: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)

    def add(self, reason: str, example: str = "", number: int = 1) -> None:
        """Count `number` files, members or records that are not used."""
        self.counts[reason] += number
        self._keep_example(reason, example)

    def note(self, remark: str, example: str) -> None:
        """Count one that is used, and of which a person should know."""
        self.kept[remark] += 1
        self._keep_example(remark, example)

    def copy(self) -> "LeftOut":
        """The same counts, in an object of its own."""
        return LeftOut(Counter(self.counts), Counter(self.kept), dict(self.examples), list(self.damaged))

    def lines(self) -> list[str]:
        """`12: not JSON, first: a.jsonl, line 3 (...)` for each reason, the most frequent one first."""
        return self._told(self.counts)

    def remarks(self) -> list[str]:
        """The same of what was kept, and then the damaged tars."""
        damaged = [f"{count(len(self.damaged), 'damaged tar')}, read as far as whole:", *self.damaged]
        return [*(f"kept {line}" for line in self._told(self.kept)), *(damaged if self.damaged else ())]

    def _keep_example(self, reason: str, example: str) -> None:
        if example:
            shown = printable(example)
            self.examples.setdefault(reason, shown if len(shown) <= MAX_EXAMPLE_CHARACTERS
                                     else shown[:MAX_EXAMPLE_CHARACTERS] + "...")

    def _told(self, counts: Counter[str]) -> list[str]:
        return [f"{number:,}: {reason}" + (f", first: {self.examples[reason]}" if reason in self.examples else "")
                for reason, number in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]


def printable(name: str) -> str:
    """A name as a terminal can show it: bytes that are not UTF-8 and control characters are written as escapes."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)
