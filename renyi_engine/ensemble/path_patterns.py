"""Regular expressions for the paths of linear maps. They are checked when they are read, and matched in bounded time.

An adapter folder that somebody else wrote may hold an expression that takes years for one path. Python's own `re`
cannot be stopped, but the package `regex` can. This file needs no torch.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable

import regex

_MOST_CHARACTERS = 10_000
_MOST_STATES = 3_000_000
"""The largest number of states of a compiled expression. It is limited because nobody can stop the compilation."""
_PATIENCE_S = 2.0
"""The seconds that one expression may take for all paths of a model."""


def check(pattern: str) -> None:
    """ValueError, which names target_modules, unless this is a regular expression. ("all-linear" is one too.)"""
    if len(pattern) > _MOST_CHARACTERS:
        raise ValueError(
            f"target_modules: expected a regular expression of at most {_MOST_CHARACTERS} characters; got "
            f"{len(pattern)}; write a shorter one, or a list of names"
        )
    if _states(pattern) > _MOST_STATES:
        raise ValueError(
            f"target_modules: the regular expression {pattern[:80]!r} takes too much memory: its groups are nested too "
            "deep, or repeated too often; write a simpler one, or a list of names"
        )
    try:
        re.compile(pattern)  # PEFT uses `re`, and it has to load the adapters
        regex.compile(pattern)
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        raise ValueError(
            f"target_modules: {pattern[:80]!r} is no regular expression ({error}); to name linear maps, write their "
            "names alone, such as q_proj v_proj"
        ) from None


def _states(pattern: str) -> float:
    """At least as many states as `regex` makes of the expression. It copies a group that is to be repeated, once for
    each repetition, together with the groups inside."""
    depth = deepest = 0
    closing = 0 if "#" in pattern else 1  # a parenthesis in a comment closes no group
    for token in re.findall(r"(?s)\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|[()]", pattern):
        depth += (token == "(") - closing * (token == ")")
        deepest = max(deepest, depth)
    counted = re.findall(r"\{(\d*),?(\d*)\}", pattern)
    counts = sorted((max(1.0, *(float(number or 1) for number in numbers)) for numbers in counted), reverse=True)
    return len(pattern) * 2.0 ** min(deepest, 100) * math.prod(counts[: deepest + 1])


def matcher(pattern: str) -> Callable[[str], bool]:
    """A function that says whether `pattern` matches a whole path.

    Raises:
        ValueError: see `check`. The function raises it too, as soon as all of its calls together take too long.
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
