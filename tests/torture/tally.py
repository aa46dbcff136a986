"""What an attack counts, and what it found."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

EXAMPLES_KEPT = 3


@dataclass
class Tally:
    """The counts of one kind of attack. A failure has a class (what is wrong, in a few words) and examples of it."""

    kind: str
    seed: int
    number: int = 0
    """Of the try that is being made. Seed and number together determine a try."""
    tries: int = 0
    equal: int = 0
    """Tries that ended with the right result."""
    refused: int = 0
    """Tries that ended with one clear line."""
    counts: Counter[str] = field(default_factory=Counter)
    """Other counts, by name."""
    failures: Counter[str] = field(default_factory=Counter)
    """The number of failures of each class."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """The first few failures of each class, with the commands that repeat them."""

    def fail(self, what: str, example: str) -> None:
        self.failures[what] += 1
        again = f"python -m tests.torture --only {self.kind} --seed {self.seed} --first {self.number} --tries 1"
        examples = self.examples.setdefault(what, [])
        if len(examples) < EXAMPLES_KEPT:
            examples.append(f"{example}\n{again}")
        if self.failures[what] == 1:
            print(f"{self.kind}: FAILURE: {what}\n{_indented(examples[0])}", flush=True)

    @property
    def more(self) -> str:
        return ", ".join(f"{number} {name}" for name, number in sorted(self.counts.items()))

    @property
    def line(self) -> str:
        return (
            f"{self.kind}: {self.tries} tries, {self.refused} refused, {self.equal} equal, "
            f"{self.failures.total()} failures; {self.more}"
        )


def table(tallies: list[Tally]) -> str:
    """The counts of all kinds, and below them every class of failure with its examples."""
    rows = [("kind", "tries", "refused", "equal", "failures", "")]
    for tally in tallies:
        numbers = (tally.tries, tally.refused, tally.equal, tally.failures.total())
        rows.append((tally.kind, *map(str, numbers), tally.more))
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for tally in tallies:
        for what, number in tally.failures.most_common():
            lines += ["", f"{tally.kind}: {number} times: {what}", *map(_indented, tally.examples[what])]
    return "\n".join(lines)


def _indented(text: str) -> str:
    return "    " + text.replace("\n", "\n    ")
