"""Rows that are left out are counted by reason, and rows that are cut are counted and named."""

from __future__ import annotations

import pytest

from renyi_engine.data.examples import Dropped, Example, tokenize
from renyi_engine.objectives.task import cut_rows, describe_rows


def test_dropped_rows_are_counted_by_reason_and_nothing_left_is_an_error():
    def one(number, row):
        if row == "good":
            return Example(number, [1, 2], [1, 2])
        raise Dropped(f"it is {row}")

    examples, dropped = tokenize(["bad", "good", "bad", "ugly"], one, "dataset_name")
    assert [e.row for e in examples] == [1]
    assert dropped == {"it is bad": [0, 2], "it is ugly": [3]}
    with pytest.raises(ValueError, match=r"dataset_name: no row is left to use \(2 rows dropped \(0, 1\): it is bad\)"):
        tokenize(["bad", "bad"], one, "dataset_name")


def test_rows_that_were_cut_are_counted_and_named():
    whole, cut = Example.cut(3, [1, 2, 3], [-100, 2, 3], 3), Example.cut(5, [1, 2, 3], [-100, 2, 3], 2)
    assert cut == Example(5, [1, 2], [-100, 2], num_cut=1)
    assert cut_rows([whole, cut]) == [5]
    assert describe_rows([whole, cut], {"it is bad": [1]}) == [
        "1 rows dropped (1): it is bad",
        "1 rows cut off at max_length (5)",
    ]
    assert describe_rows([whole], {}) == []
