"""A page of an evaluation is self-contained, shows what it is given in that order, and lets no text in as HTML."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from renyi_engine.reports import charts
from renyi_engine.reports.page import Key, Picture, Section, Table, as_text, page_title, write_page
from renyi_engine.reports.pictures import particle_colours

from ..html_page import Page, assert_only_our_script, pictures_of

EVIL = '<script>alert("1")</script>'


def scatter(name: str, kind: str = "kind") -> Picture:
    label = {"xlabel": kind, "ylabel": kind, "caption": kind, "vertical": {kind: 0.5}}
    return charts.scatter(name, [0.0, 1.0], [0.0, 1.0], [kind, "other"], **label)


def heat_map(name: str, group: str = "all") -> Picture:
    even = np.full((2, 4), 0.5)
    groups, four = [(group, 3), ("rest", 1)], [group] * 4
    return charts.heat_map(name, even, names=four, texts=four, xlabel=group, caption=group, groups=groups)


def make_page(output: Path, **content: Any) -> Path:
    sections = [
        Section("First heading", "First text.", [Table("A table", ["who", "score"], [["base", "1.5"]], "A note.")]),
        Section("Second heading", "Second text.", pictures=[scatter("one"), heat_map("two")]),
    ]
    details = {"Command": "renyi-engine mmlu", "Settings": {"alpha": 0.8, "seed": None}}
    page = {"title": "A title", "lead": "A lead.", "found": "What was found.", "sections": sections}
    return write_page(output, **{**page, "words": [("Word", "Meaning.")], "details": details, **content})


def test_everything_given_is_on_the_page_in_its_order(tmp_path: Path) -> None:
    output = tmp_path / "sub" / "page.html"
    assert make_page(output) == output
    expected = ["A title", "A title", "A lead.", "What was found.", "Words on this page", "Word", "Meaning."]
    expected += ["First heading", "First text.", "A table", "who", "base", "1.5", "A note.", "Second heading"]
    expected += ["Second text."]
    expected += ["kind", "(1)", "adds up to 1", "Command", "renyi-engine mmlu", "alpha", "0.8", "seed", "null"]
    text = Page(output).text
    found = 0
    for part in expected:
        found = text.index(part, found) + len(part)
    assert len(pictures_of(output)) == 2
    assert [file.name for file in output.parent.iterdir()] == ["page.html"]


def test_the_page_loads_nothing_and_its_ids_are_unique(tmp_path: Path) -> None:
    output = make_page(tmp_path / "page.html")
    page, source = Page(output), output.read_text(encoding="utf-8")
    assert not {"link", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert_only_our_script(output)
    assert not re.search(r"https?:|@import", source)
    loaded = page.values("src", "href", "xlink:href")
    assert all(value.startswith(("#", "data:image/png;base64,")) for value in loaded)
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    references = [value[1:] for value in loaded if value.startswith("#")] + re.findall(r"url\(#([^)]+)\)", source)
    assert references
    assert set(references) <= set(ids)


def test_text_from_outside_is_escaped_wherever_it_stands(tmp_path: Path) -> None:
    table, empty = Table(EVIL, [EVIL], [[EVIL]], EVIL), Table(EVIL, [EVIL], [], empty=EVIL)
    bars = charts.bars("bars", [EVIL], [[0.5]], [[0.1]], rows=[EVIL], ylabel=EVIL, caption=EVIL)
    curves = charts.risk_coverage("risk", {EVIL: ([0.5, 1], [0, 0.5])}, caption=EVIL)
    groups = charts.group_heat_map("groups", np.full((2, 1), 0.5), [EVIL], caption=EVIL)
    drawn = [scatter("scatter", EVIL), heat_map("heat", EVIL), bars, curves, groups]
    sections = [Section(EVIL, EVIL, [table, empty], drawn)]
    details = {EVIL: EVIL, "settings": {EVIL: EVIL}}
    output = make_page(
        tmp_path / "page.html", title=EVIL, lead=EVIL, found=EVIL, sections=sections, words=[(EVIL, EVIL)],
        details=details,
    )  # fmt: skip
    assert output.read_text().count("<script") == 1
    assert_only_our_script(output)
    assert Page(output).text.count("<script>") > 25


def test_a_dollar_sign_in_a_label_is_one() -> None:
    assert ">from $5 to $6</text>" in scatter("dollars", "from $5 to $6").svg


def test_two_pictures_of_one_name_are_refused_and_the_old_page_stays(tmp_path: Path) -> None:
    output = tmp_path / "page.html"
    output.write_text("old")
    sections = [Section("a", "b", pictures=[scatter("same")]), Section("c", "d", pictures=[scatter("same")])]
    with pytest.raises(ValueError, match="2 pictures are named 'same'"):
        make_page(output, sections=sections)
    assert output.read_text() == "old"


@pytest.mark.parametrize("name", ["", "two words", 'a"b', "<b>", "1"])
def test_a_name_that_makes_no_id_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="name: expected letters, digits and hyphens"):
        scatter(name)


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    assert make_page(tmp_path / "a.html").read_bytes() == make_page(tmp_path / "b.html").read_bytes()


def test_words_details_tables_and_pictures_may_be_left_out(tmp_path: Path) -> None:
    sections = [Section("Heading", "Text.")]
    page = Page(write_page(tmp_path / "page.html", title="Title", lead="Lead.", found="Found.", sections=sections))
    assert [tag for tag, _ in page.tags if tag in ("table", "svg", "dl", "details", "h2")] == ["h2"]
    assert page.text.split() == ["Title", "Title", "Lead.", "Found.", "Heading", "Text."]


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (["1.5", "–", "", "12,345"], "num"),
        (["91.5 %", "−3", "nan"], "num"),
        (["0.52 ± 0.03"], "num"),
        (["41.2 [39.1, 43.3]", "1e-05"], "num"),
        (["1.5", "not recorded"], ""),
        (["particle 3"], ""),
        (["an excerpt of an example", "1.5"], "long"),
        ([], ""),
    ],
)
def test_columns_of_numbers_are_set_to_the_right_and_those_of_texts_have_room(cells: list[str], expected: str) -> None:
    assert Table("", ["who", "what"], [["a", cell] for cell in cells]).classes == ["", expected]


@pytest.mark.parametrize("K", [1, 3, 12])
def test_the_legend_names_keys_and_particles(tmp_path: Path, K: int) -> None:
    picture = Picture(scatter("one").svg, "Caption.", [Key("dash", "#123456", "base model")], num_particles=K)
    output = make_page(tmp_path / "page.html", sections=[Section("a", "b", pictures=[picture])])
    styles = " ".join(Page(output).values("style"))
    assert all(colour in styles for colour in ["#123456", *particle_colours(K)])
    assert "base model particle" in " ".join(Page(output).text.split())


def test_the_words_stand_above_the_tables_that_use_them(tmp_path: Path) -> None:
    tags = [tag for tag, _ in Page(make_page(tmp_path / "page.html")).tags]
    assert tags.index("dl") < tags.index("table")


def test_an_empty_table_says_why(tmp_path: Path) -> None:
    table = Table("Examples to look at", ["row", "example"], [], "A note.", "There is none: all are alike.")
    page = Page(make_page(tmp_path / "page.html", sections=[Section("a", "b", [table])], details=None))
    assert "Examples to look at There is none: all are alike. A note." in " ".join(page.text.split())
    assert "table" not in [tag for tag, _ in page.tags]
    assert as_text(table) == "Examples to look at\nrow  example\nThere is none: all are alike.\n"


def test_pages_of_several_folders_have_titles_that_differ(tmp_path: Path) -> None:
    titles = [page_title(tmp_path / name, "eval nll", "org/tiny") for name in ("one", "two")]
    assert titles == ["one: eval nll of tiny", "two: eval nll of tiny"]
    assert page_title(tmp_path / "one" / "..", "sft", str(tmp_path / "models" / "big")).endswith(": sft of big")


def test_wide_tables_scroll_in_a_box_that_the_keyboard_reaches(tmp_path: Path) -> None:
    source = make_page(tmp_path / "page.html").read_text()
    assert re.search(r'<div class="scroll" tabindex="0">\s*<table', source)
    assert ".scroll { overflow-x: auto; }" in source
    assert re.search(r"figure svg \{ [^}]*width: 100%;", source)


def test_a_character_that_steers_is_shown_as_a_code(tmp_path: Path) -> None:
    steering = "a\x00b\x1b[2Jc\u202ed\u2066e\udcfff"
    table = Table(steering, [steering], [[steering]], steering)
    sections = [Section(steering, steering, [table], [heat_map("heat", "a\x1b\u202e")])]
    output = make_page(
        tmp_path / "page.html", title=steering, lead=steering, sections=sections, details={"settings": {"s": steering}}
    )
    text = output.read_text(encoding="utf-8")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]", text)
    assert r"a\x00b\x1b[2Jc\u202ed\u2066e\udcfff" in Page(output).text
    assert_only_our_script(output)


def test_line_ends_of_windows_are_plain_line_ends(tmp_path: Path) -> None:
    assert "one\ntwo" in make_page(tmp_path / "page.html", lead="one\r\ntwo").read_text(encoding="utf-8")


@pytest.mark.filterwarnings("error")
def test_labels_of_any_language_raise_no_warning() -> None:
    assert "\u6570\u5b66" in charts.group_heat_map("groups", np.full((2, 1), 0.5), ["\u6570\u5b66"], caption="").svg
