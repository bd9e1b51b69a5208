"""What a pass over a corpus left out: a count for each reason, and where it happened first."""

from collections import Counter
from dataclasses import dataclass, field

OTHER_PART = "belongs to the other part"


@dataclass
class LeftOut:
    """Counts by reason, and one example for each reason: the name, the line or row, and what was found there."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, example: str = "", number: int = 1) -> None:
        """Count `number` files or records; the first example of a reason is kept."""
        self.counts[reason] += number
        if example:
            self.examples.setdefault(reason, printable(example))

    def copy(self) -> "LeftOut":
        """The same counts, in an object of its own."""
        return LeftOut(Counter(self.counts), dict(self.examples))

    def lines(self) -> list[str]:
        """`12: not JSON, first: a.jsonl, line 3 (...)` for each reason, in alphabetical order."""
        return [f"{number:,}: {reason}" + (f", first: {self.examples[reason]}" if reason in self.examples else "")
                for reason, number in sorted(self.counts.items())]


def printable(name: str) -> str:
    """A name as a terminal can show it: bytes that are not UTF-8 and control characters are written as escapes."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)
