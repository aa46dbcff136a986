"""Checks of the columns of a data set and of the values in them, and the errors that say what was expected."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from renyi_engine.core import typos


def columns_of(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Every column that some row has, in the order in which the columns first appear."""
    return list(dict.fromkeys(column for row in rows for column in row))


def missing_column(argument: str, columns: Iterable[str], wanted: Sequence[str]) -> ValueError:
    """The error for a data set whose columns are none of the `wanted` forms, such as "prompt + completion".

    It says how to convert two forms that are in common use, or which column may have a misspelt name.
    """
    columns = list(columns)
    near = {w: typos.near_misses(w, columns) for form in wanted for w in form.split(" + ")}
    hints = [f"is {found[0]!r} meant to be {name!r}?" for name, found in near.items() if found and found[0] != name]
    if "messages" in wanted and "conversations" in columns:
        hints = [
            "to convert ShareGPT's form, rename the column conversations to messages, and in each of its turns from to "
            "role, value to content, the role human to user and the role gpt to assistant"
        ]
    elif "messages" in wanted and {"instruction", "output"} <= set(columns):
        hints = [
            "to convert Alpaca's form, rename output to completion and instruction to prompt; where input is not "
            "empty, append an empty line and input to the prompt"
        ]
    return ValueError(
        f"{argument}: expected the columns {' or '.join(wanted)}; got {columns}" + (f"; {hints[0]}" if hints else "")
    )


def warn_unread(argument: str, columns: Iterable[str], read: Iterable[str]) -> None:
    """Warn once for a data set of the columns that are not read: the user may expect one of them to have an effect."""
    unread = [column for column in columns if column not in set(read)]
    if unread:
        warnings.warn(f"{argument}: these columns are not read: {', '.join(unread)}", stacklevel=2)


def unexpected(place: str, expected: str, got: Any) -> ValueError:
    """The error for a value in the data that is of another kind than it should be."""
    return ValueError(f"{place}: expected {expected}; got {type(got).__name__} {str(got)[:60]!r}")


def require_field(holds: bool, number: int, column: str, expected: str, got: Any) -> None:
    """Raise `unexpected` for a column of row `number`, unless the condition `holds`."""
    if not holds:
        raise unexpected(f"row {number}: {column}", expected, got)
