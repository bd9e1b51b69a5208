"""What a conversion leaves out: a count for each reason, with the first example; nothing is left out without a word."""

from collections import Counter

from common.wording import count

MAX_EXAMPLE_CHARACTERS = 300


class LeftOut:
    """Counts of what is no pair, and of what was kept although it is unusual.

    `damaged` holds a line for every damaged tar, of which only what stands before the damage was read.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.kept: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        self.damaged: list[str] = []

    def add(self, reason: str, name: str) -> None:
        """Count one file or member that is no part of a pair."""
        self.counts[reason] += 1
        self.examples.setdefault(reason, printable(name))

    def note(self, remark: str, name: str) -> None:
        """Count one file or member that is used, and of which the user should know."""
        self.kept[remark] += 1
        self.examples.setdefault(remark, printable(name))

    def lines(self) -> list[str]:
        """For a person: the most frequent reason first, then what was kept, then every damaged tar."""
        left = [f"left out {number:,}: {reason}; first: {self.examples[reason]}"
                for reason, number in self.counts.most_common()]
        kept = [f"kept {number:,}: {remark}; first: {self.examples[remark]}"
                for remark, number in self.kept.most_common()]
        if not self.damaged:
            return left + kept
        return [*left, *kept, f"{count(len(self.damaged), 'damaged tar')}, read as far as whole:", *self.damaged]


def printable(name: str) -> str:
    """A name as a terminal can show it: control characters and bytes that are no UTF-8 as escapes, at most 300 long."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in name)
    return shown if len(shown) <= MAX_EXAMPLE_CHARACTERS else shown[:MAX_EXAMPLE_CHARACTERS] + "..."
