"""Suggestions for a mistyped name."""

from __future__ import annotations

from collections.abc import Iterable


def hint(name: str, known: Iterable[str]) -> str:
    """ "; did you mean 'alpha'?", or nothing if no known name is near: a wrong suggestion is worse than none."""
    found = near_misses(name, known)
    return f"; did you mean {' or '.join(map(repr, found))}?" if found else ""


def near_misses(name: str, known: Iterable[str]) -> list[str]:
    """The known names nearest to `name`, if they are at most one slip away from it, or two if it has at least 8
    characters. A slip is a character too many, too few or wrong, or two neighbours exchanged. Case, and whether words
    are joined by - or _, do not matter."""
    distances = {other: _slips(_plain(name), _plain(other)) for other in known}
    least = min(distances.values(), default=0)
    return [other for other, slips in distances.items() if slips == least <= (2 if len(name) >= 8 else 1)]


def _plain(name: str) -> str:
    return name.casefold().replace("-", "_")


def _slips(a: str, b: str) -> int:
    """The edit distance of Damerau in its simple form: no character is changed twice."""
    if abs(len(a) - len(b)) > 2:
        return abs(len(a) - len(b))  # more than any hint allows
    before_last: list[int] = []
    last = list(range(len(b) + 1))
    for i, one in enumerate(a, start=1):
        row = [i]
        for j, other in enumerate(b, start=1):
            slips = min(last[j] + 1, row[-1] + 1, last[j - 1] + (one != other))
            if i > 1 and j > 1 and (one, a[i - 2]) == (b[j - 2], other):
                slips = min(slips, before_last[j - 2] + 1)
            row.append(slips)
        before_last, last = last, row
    return last[-1]
