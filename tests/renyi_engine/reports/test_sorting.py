"""The script of a page sorts its tables. It runs here in QuickJS, on tables that answer as those of a browser do."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import dukpy
import pytest

from renyi_engine.reports import Section, Table, write_page

from ..html_page import SCRIPT, Page

# just what the script asks of a document with one table
DOCUMENT = """
const cell = (text, kind) => ({
  textContent: text, className: kind, attributes: {}, children: [],
  getAttribute(name) { return this.attributes[name]; },
  setAttribute(name, value) { this.attributes[name] = value; },
  replaceChildren(...children) { this.children = children; },
});
const header = dukpy["header"].map((text, i) => cell(text, dukpy["classes"][i]));
const body = {
  rows: dukpy["rows"].map((row) => ({cells: row.map((text) => cell(text, ""))})),
  append(...rows) { this.rows = rows; },
};
const table = {tBodies: [body], tHead: {rows: [{cells: header}]}};
const document = {
  querySelectorAll: (selector) => (selector === "table.sorts" ? [table] : []),
  createElement: (tag) => ({tag, addEventListener(event, answer) { this[event] = answer; }}),
};
"""
CLICKS = """
for (const column of dukpy["clicks"]) header[column].children[0].click();
({
  rows: body.rows.map((row) => row.cells.map((cell) => cell.textContent)),
  said: header.map((column) => column.attributes["aria-sort"]),
  buttons: header.map((column) => column.children.map(({tag, type, textContent}) => [tag, type, textContent])),
})
"""


def clicked(table: Table, *clicks: int) -> dict[str, list]:
    """What the table holds and says once the names of these columns were clicked, one after the other."""
    given = {"header": table.header, "classes": table.classes, "rows": table.rows, "clicks": clicks}
    return dukpy.evaljs([DOCUMENT, SCRIPT.read_text(encoding="utf-8"), CLICKS], **given)


def column(cells: Sequence[str], *clicks: int) -> list[str]:
    """The cells of a column beside another one, after the clicks."""
    table = Table("", ["place", "column"], [[str(i), text] for i, text in enumerate(cells)])
    return [text for _, text in clicked(table, *clicks)["rows"]]


@pytest.mark.parametrize(
    "upwards",
    [
        ["2", "10", "1,000", "nan"],
        ["\u22123.5", "-1", "+0.25", "7", "\u2013"],
        ["1e-05", "0.5 \u00b1 0.1", "1.25 \u00b1 0.01", ""],
        ["9.5 %", "12 %", "100 %"],
        ["-inf", "0", "inf", "nan"],
        ["0.00 (7)", "0.50 (1)", "1.00 (2)"],
        ["base", "mixture", "particle 0", ""],
    ],
)
def test_numbers_sort_as_numbers_and_what_says_nothing_is_last_both_ways(upwards: list[str]) -> None:
    given = upwards[::-1]
    assert column(given, 1) == upwards
    known = [text for text in upwards if text not in ("nan", "\u2013", "")]
    assert column(given, 1, 1) == known[::-1] + upwards[len(known) :]


def test_the_third_click_brings_back_the_order_of_the_page() -> None:
    given = ["3", "1", "2"]
    assert column(given, 1, 1, 1) == given
    assert column(given, 1, 0, 0, 0) == given


def test_rows_that_are_equal_stay_in_their_order() -> None:
    table = Table("", ["who", "score"], [["a", "1"], ["b", "2"], ["c", "1"], ["d", "2"]])
    assert [who for who, _ in clicked(table, 1)["rows"]] == ["a", "c", "b", "d"]
    assert [who for who, _ in clicked(table, 1, 1)["rows"]] == ["b", "d", "a", "c"]


def test_the_name_of_a_column_is_a_button_that_says_how_the_table_is_sorted() -> None:
    table = Table("", ["who", "score"], [["a", "1"], ["b", "2"]])
    assert clicked(table)["buttons"] == [[["button", "button", "who"]], [["button", "button", "score"]]]
    assert clicked(table)["said"] == ["none", "none"]
    assert clicked(table, 1)["said"] == ["none", "ascending"]
    assert clicked(table, 1, 1)["said"] == ["none", "descending"]
    assert clicked(table, 1, 0)["said"] == ["ascending", "none"]


def test_a_page_marks_the_tables_that_there_is_something_to_sort_in(tmp_path: Path) -> None:
    two, one = (Table("", ["who", "score"], [["a", "1"], ["b", "2"]][:count]) for count in (2, 1))
    sections = [Section("Heading", "Text.", [two, one])]
    output = write_page(tmp_path / "page.html", title="Title", lead="Lead.", found="Found.", sections=sections)
    page = Page(output)
    assert [attrs.get("class") for tag, attrs in page.tags if tag == "table"] == ["sorts", None]
    # without the script, a column is named by its text alone
    assert re.findall(r'<th scope="col" class="[^"]*">([^<]*)</th>', output.read_text()) == ["who", "score"] * 2
