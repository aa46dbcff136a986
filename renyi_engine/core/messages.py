"""What a message quotes: the error of a library, or a list of names. Each is one line of limited length."""

from __future__ import annotations

from collections.abc import Sequence

MOST_CHARACTERS = 1000


def reason(error: BaseException) -> str:
    """The message of an error, in one line of at most 1000 characters. If it has no message: the name of its class."""
    return " ".join(str(error).split())[:MOST_CHARACTERS] or type(error).__name__


def some(names: Sequence[str], most: int = 3) -> str:
    """The first names, and how many more there are: "a, b, c and 2 more"."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
