"""From rows to examples: the tokens of a row and their labels, and the rows that are left out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from renyi_kernels import IGNORE_INDEX

T = TypeVar("T")


@dataclass(frozen=True)
class Example:
    """The tokens of row number `row`, and a label for each: the token itself if it is learnt, else -100. `num_cut`
    tokens beyond max_length were cut off at the end."""

    row: int
    input_ids: list[int]
    labels: list[int]
    num_cut: int = 0

    @classmethod
    def cut(cls, row: int, input_ids: list[int], labels: list[int], max_length: int) -> Example:
        """The example of the first `max_length` tokens."""
        return cls(row, input_ids[:max_length], labels[:max_length], max(len(input_ids) - max_length, 0))

    @property
    def sequences(self) -> tuple[Example, ...]:
        return (self,)

    @property
    def num_labels(self) -> int:
        # no token stands before the first one, so nothing predicts it
        return sum(label != IGNORE_INDEX for label in self.labels[1:])


class Dropped(ValueError):
    """Raised for a row that cannot be trained on. The message is the reason, and rows are counted by their reason."""


def tokenize(
    rows: Iterable[Mapping[str, Any]], one: Callable[[int, Mapping[str, Any]], T], argument: str
) -> tuple[list[T], dict[str, list[int]]]:
    """(examples, dropped): what `one` makes of every row, and for each reason the numbers of the rows left out.

    Raises:
        ValueError: no row is left. The message says why rows were left out.
    """
    examples: list[T] = []
    dropped: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        try:
            examples.append(one(number, row))
        except Dropped as reason:
            dropped.setdefault(str(reason), []).append(number)
    if not examples:
        raise ValueError(f"{argument}: no row is left to use ({'; '.join(describe_dropped(dropped))})")
    return examples, dropped


def describe_dropped(dropped: Mapping[str, Sequence[int]]) -> list[str]:
    """A line for each reason: how many rows were dropped, which, and why."""
    return [f"{len(rows)} rows dropped ({name_rows(rows)}): {reason}" for reason, rows in dropped.items()]


def name_rows(numbers: Sequence[int]) -> str:
    """The numbers of the first ten rows, as text."""
    return f"{', '.join(map(str, numbers[:10]))}{', ...' if len(numbers) > 10 else ''}"
