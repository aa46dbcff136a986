"""Token sequences of a data set, and the order in which training sees them.

Layout: B sequences, T tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from renyi_kernels import IGNORE_INDEX

T = TypeVar("T")

MOST_TEXT = 120
"""Characters that an excerpt shows before what is learnt, and as many from there on."""


@dataclass(frozen=True)
class Example:
    """One tokenised row. `labels` is aligned with `input_ids`; -100 where no token counts. `num_cut`: tokens beyond
    max_length that were cut off its end."""

    row: int
    input_ids: list[int]
    labels: list[int]
    num_cut: int = 0

    @classmethod
    def cut(cls, row: int, input_ids: list[int], labels: list[int], max_length: int) -> Example:
        """The first `max_length` tokens."""
        return cls(row, input_ids[:max_length], labels[:max_length], max(len(input_ids) - max_length, 0))

    @property
    def sequences(self) -> tuple[Example, ...]:
        return (self,)

    @property
    def num_labels(self) -> int:
        # the first token has no prediction
        return sum(label != IGNORE_INDEX for label in self.labels[1:])


class Dropped(ValueError):
    """A row that cannot be trained on. The message is the reason, under which the row is counted."""


def tokenize(
    rows: Iterable[Mapping[str, Any]], one: Callable[[int, Mapping[str, Any]], T], argument: str
) -> tuple[list[T], dict[str, list[int]]]:
    """(examples, dropped): every row through `one`, and the numbers of the rows left out for each reason.

    Raises:
        ValueError: no row is left; the message says why each kind was dropped.
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
    """A line a reason: how many rows, which, and why."""
    return [f"{len(rows)} rows dropped ({name_rows(rows)}): {reason}" for reason, rows in dropped.items()]


def name_rows(numbers: Sequence[int]) -> str:
    """The numbers of the first ten rows, as text."""
    return f"{', '.join(map(str, numbers[:10]))}{', ...' if len(numbers) > 10 else ''}"


def unexpected(place: str, expected: str, got: Any) -> ValueError:
    """An error for a value in the data that is of another kind than it should be."""
    return ValueError(f"{place}: expected {expected}; got {type(got).__name__} {str(got)[:60]!r}")


def warn_unread(argument: str, columns: Iterable[str], read: Iterable[str]) -> None:
    """Name the columns that are not read, once for a data set: the user may expect one of them to have an effect."""
    unread = [column for column in columns if column not in set(read)]
    if unread:
        warnings.warn(f"{argument}: these columns are not read: {', '.join(unread)}", stacklevel=2)


def marked(tokenizer: PreTrainedTokenizerBase, example: Example) -> list[tuple[str, bool]]:
    """The example's text in stretches, each with whether it is learnt."""
    stretches = []
    start = 0
    learnt = [label != IGNORE_INDEX for label in example.labels]
    for end in range(1, len(learnt) + 1):
        if end == len(learnt) or learnt[end] != learnt[start]:
            stretches.append((tokenizer.decode(example.input_ids[start:end]), learnt[start]))
            start = end
    return stretches


def excerpt(tokenizer: PreTrainedTokenizerBase, example: Example) -> str:
    """The end of the text before what is learnt, and the beginning of the rest; what is learnt stands in [[ ]]."""
    stretches = marked(tokenizer, example)
    before = "" if stretches[0][1] else stretches.pop(0)[0]
    text = "..." + before[-MOST_TEXT:] if len(before) > MOST_TEXT else before
    room = MOST_TEXT
    for stretch, learnt in stretches:
        shown = stretch[:room] + ("..." if len(stretch) > room else "")
        text += f"[[{shown}]]" if learnt else shown
        room -= len(stretch)
        if room <= 0:
            break
    return " ".join(text.split())
