"""Regular expressions for the paths of linear maps: checked when they are read, and matched in bounded time.

An adapter folder that somebody else wrote may hold one that takes years for a single path, and Python's own `re` cannot
be stopped; the package `regex` can. This needs no torch.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable

import regex

_MOST_CHARACTERS = 10_000
_MOST_STATES = 3_000_000
"""Of a compiled expression, at the most; its compilation cannot be stopped."""
_PATIENCE_S = 2.0
"""Seconds that one expression may take for all paths of a model."""


def check(pattern: str) -> None:
    """ValueError, which names target_modules, unless this is a regular expression; "all-linear" is one too."""
    if len(pattern) > _MOST_CHARACTERS:
        raise ValueError(
            f"target_modules: a regular expression of {len(pattern)} characters; expected at most {_MOST_CHARACTERS}"
        )
    if _states(pattern) > _MOST_STATES:
        raise ValueError(
            f"target_modules: the regular expression {pattern[:80]!r} takes too much memory: groups are nested too "
            "deep, or repeated too often; write a simpler one, or a list of names"
        )
    try:
        re.compile(pattern)  # PEFT, which has to load the adapters, uses this one
        regex.compile(pattern)
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        raise ValueError(
            f"target_modules: {pattern[:80]!r} is not a regular expression ({error}); to name linear maps, write their "
            "names alone, such as q_proj v_proj"
        ) from None


def _states(pattern: str) -> float:
    """No fewer than `regex` makes of it: a repeated group is copied, as often as is counted, and in it those inside."""
    depth = deepest = 0
    closing = 0 if "#" in pattern else 1  # a parenthesis in a comment closes nothing
    for token in re.findall(r"(?s)\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|[()]", pattern):
        depth += (token == "(") - closing * (token == ")")
        deepest = max(deepest, depth)
    counted = re.findall(r"\{(\d*),?(\d*)\}", pattern)
    counts = sorted((max(1.0, *(float(number or 1) for number in numbers)) for numbers in counted), reverse=True)
    return len(pattern) * 2.0 ** min(deepest, 100) * math.prod(counts[: deepest + 1])


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
