"""What messages quote is one line of bounded length."""

from __future__ import annotations

import pytest

from renyi_engine.core.messages import MOST_CHARACTERS, reason, some


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("one line"), "one line"),
        (ValueError("two\n   lines\n"), "two lines"),
        (NotImplementedError(), "NotImplementedError"),
        (OSError("x" * 10**6), "x" * MOST_CHARACTERS),
    ],
)
def test_a_reason_is_one_line_and_never_empty(error, expected):
    assert reason(error) == expected


@pytest.mark.parametrize(
    ("names", "expected"),
    [([], ""), (["a"], "a"), (["a", "b", "c"], "a, b, c"), (["a", "b", "c", "d", "e"], "a, b, c and 2 more")],
)
def test_of_many_names_some_are_shown_and_the_rest_is_counted(names, expected):
    assert some(names) == expected
