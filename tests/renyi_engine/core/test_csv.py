"""Tables for spreadsheets: no text is a formula there, and each can be read back as it was."""

from __future__ import annotations

import csv
from dataclasses import asdict, dataclass

import pytest
from hypothesis import given, strategies as st

from renyi_engine.core.files import write_csv


@dataclass
class Row:
    number: float
    text: str


FORMULAS = ["=cmd|'/c calc'!A1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "＝1", "－1", "=", "-"]


@pytest.mark.parametrize("text", FORMULAS)
def test_a_text_that_a_spreadsheet_would_compute_stands_behind_an_apostrophe(tmp_path, text):
    write_csv(tmp_path / "a.csv", [Row(-1.5, text)])
    with (tmp_path / "a.csv").open(newline="", encoding="utf-8") as file:
        [row] = csv.DictReader(file)
    assert row == {"number": "-1.5", "text": f"'{text}"}  # a negative number stays one


TEXTS = st.text(st.characters(exclude_categories=["Cs"]))


@given(st.lists(st.builds(Row, st.floats(allow_nan=False), TEXTS), min_size=1))
def test_what_is_read_is_what_was_written(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    rows += [Row(1.0, text) for text in (*FORMULAS, "'", "''=1", "a=1", "", '"quoted", and more')]
    write_csv(path, rows)
    with path.open(newline="", encoding="utf-8") as file:
        read = [{name: cell.removeprefix("'") for name, cell in row.items()} for row in csv.DictReader(file)]
    assert read == [{name: str(value) for name, value in asdict(row).items()} for row in rows]
