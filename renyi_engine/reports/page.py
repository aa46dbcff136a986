"""Self-contained HTML pages: tables, pictures and words in one file that loads nothing; all text is escaped.

The look is in templates/base.html.j2; evaluations are shown by `write_page`, training runs by report.py.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from renyi_engine.core import one_line, write_text
from renyi_engine.reports.pictures import particle_colours

NUMBERS = re.compile(r"(nan|inf|[\d\s.,%±+−–()\[\]/e-])*")


@dataclass(frozen=True)
class Table:
    """A table of ready-made text."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    @property
    def classes(self) -> list[str]:
        """How each column is set: "num" if it holds only numbers, percentages and dashes."""
        columns = [[row[i] for row in self.rows if i < len(row)] for i in range(self.num_columns)]
        return ["num" if cells and all(map(NUMBERS.fullmatch, cells)) else "" for cells in columns]

    @property
    def num_columns(self) -> int:
        return max(map(len, (self.header, *self.rows)))


class Key(NamedTuple):
    """One entry of a legend. kind: wide, dash, dots (lines); square, circle, triangle, diamond. colour: of CSS."""

    kind: str
    colour: str
    label: str


@dataclass(frozen=True)
class Picture:
    """An inline SVG of `pictures.svg`, what it shows, and its legend, which also has `num_particles` particles."""

    svg: str
    caption: str
    keys: Sequence[Key] = ()
    num_particles: int = 0


@dataclass(frozen=True)
class Section:
    """A part of a page: what is asked and how to read the answer, then tables, then pictures."""

    heading: str
    text: str
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()


def as_text(table: Table) -> str:
    """The table in the columns of a terminal."""
    rows = [[one_line(cell) for cell in row] for row in (table.header, *table.rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = [str.rjust if kind else str.ljust for kind in table.classes]
    lines = [
        "  ".join(align(cell, width) for align, cell, width in zip(aligned, row, widths, strict=True)).rstrip()
        for row in rows
    ]
    title = [one_line(table.title)] if table.title else []
    return "\n".join([*title, *lines]) + "\n"


def write_page(
    output: Path,
    *,
    title: str,
    lead: str,
    sections: Sequence[Section],
    words: Sequence[tuple[str, str]] = (),
    details: Mapping[str, Any] | None = None,
) -> Path:
    """Write one HTML page of `sections`, the most important one first; returns `output`.

    Args:
        lead: what the page is about, in a sentence or two.
        words: (word, meaning) of what the sections take for granted; shown after the first one.
        details: what was run, folded away: a mapping is shown as a table, anything else as it is.

    Raises:
        ValueError: two pictures share a name; `output` is then left as it was.
    """
    svgs = [picture.svg for section in sections for picture in section.pictures]
    [(name, count)] = Counter(re.findall(r'\bid="([\w-]+)-figure_1"', "".join(svgs))).most_common(1) or [("", 1)]
    if count > 1:
        raise ValueError(
            f"sections: {count} pictures are named {name!r}; give each picture of a page a name of its own"
        )
    return fill(output, "page.html.j2", title=title, lead=lead, sections=sections, words=words, details=details or {})


def fill(output: Path, template: str, **content: Any) -> Path:
    """Write `template` of this package, filled with `content`; returns `output`, whose folder is made if need be."""
    loader = PackageLoader("renyi_engine.reports")
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, undefined=StrictUndefined)
    environment.globals["particle_colours"] = particle_colours
    page = environment.get_template(template).render(content)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, page)
    return output
