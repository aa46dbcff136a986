"""Suggestions for a mistyped name."""

from __future__ import annotations

from collections.abc import Iterable


def hint(name: str, known: Iterable[str]) -> str:
    """ "; did you mean 'alpha'?", or no text if no known name is near: a wrong suggestion is worse than none."""
    found = near_misses(name, known)
    return f"; did you mean {' or '.join(map(repr, found))}?" if found else ""


def near_misses(name: str, known: Iterable[str]) -> list[str]:
    """The known names that are nearest to `name`, if they are near enough.

    A name is near enough if it is one slip away, or two slips if `name` has 8 or more characters. A slip is one
    character too many, too few or wrong, or two neighbours exchanged. Upper case counts as lower case, and - as _.
    """
    from rapidfuzz.distance import OSA  # imported late: machines that only run benchmarks lack it

    distances = {other: OSA.distance(_plain(name), _plain(other)) for other in known}
    least = min(distances.values(), default=0)
    return [other for other, slips in distances.items() if slips == least <= (2 if len(name) >= 8 else 1)]


def _plain(name: str) -> str:
    return name.casefold().replace("-", "_")
