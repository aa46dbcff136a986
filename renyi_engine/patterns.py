"""Regular expressions for the paths of linear maps: checked when they are read, and matched in bounded time.

An adapter folder that somebody else wrote may hold one that takes years for a single path, and Python's own `re` cannot
be stopped; the package `regex` can. This needs no torch.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import regex

_MOST_CHARACTERS = 10_000
_PATIENCE_S = 2.0
"""Seconds that one expression may take for all paths of a model."""


def check(pattern: str) -> None:
    """ValueError, which names target_modules, unless this is a regular expression; "all-linear" is one too."""
    if len(pattern) > _MOST_CHARACTERS:
        raise ValueError(
            f"target_modules: a regular expression of {len(pattern)} characters; expected at most {_MOST_CHARACTERS}"
        )
    try:
        re.compile(pattern)  # PEFT, which has to load the adapters, uses this one
        regex.compile(pattern)
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        raise ValueError(
            f"target_modules: {pattern[:80]!r} is not a regular expression ({error}); to name linear maps, write their "
            "names alone, such as q_proj v_proj"
        ) from None


def matcher(pattern: str) -> Callable[[str], bool]:
    """A function that says whether `pattern` matches a whole path.

    Raises:
        ValueError: see `check`. The function raises it too, once all of its calls together take too long.
    """
    check(pattern)
    compiled, end = regex.compile(pattern), time.monotonic() + _PATIENCE_S

    def matches(path: str) -> bool:
        try:
            return compiled.fullmatch(path, timeout=max(end - time.monotonic(), 1e-3)) is not None
        except TimeoutError:
            raise ValueError(
                f"target_modules: the regular expression {pattern[:80]!r} takes more than {_PATIENCE_S:g} s to match "
                "the paths of linear maps; write a simpler one, or a list of names"
            ) from None

    return matches
