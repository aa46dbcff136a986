"""Self-contained HTML pages: tables, pictures and words in one file. A page loads nothing, and all text is escaped. A
character that steers, such as a mark that turns the direction of writing, is shown as a code.

One script runs on a page: templates/sort.js, which sorts tables. The page's content security policy names that script
by its checksum and forbids every other one, so a browser runs no script that got into a page in some other way.

The look is in templates/base.html.j2. `write_page` shows evaluations; training/report.py shows training runs.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from renyi_engine.core import one_line, visible, write_text
from renyi_engine.reports import glossary as shared_words
from renyi_engine.reports.pictures import particle_colours

NUMBERS = re.compile(r"(nan|inf|[\d\s.,%±+−–()\[\]/e-])*")
LONG = 20
"""Characters from which a cell is a text that needs room, even on a narrow screen."""


@dataclass(frozen=True)
class Table:
    """A table of ready-made text.

    Attributes:
        empty: why the table has no row, in a sentence; shown in place of the rows where there are none.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    empty: str = "This table has no rows."

    @property
    def classes(self) -> list[str]:
        """How each column is set: "num" if it holds only numbers, percentages and dashes; "long" if it holds texts."""
        return [self._class([row[i] for row in self.rows if i < len(row)]) for i in range(self.num_columns)]

    @staticmethod
    def _class(cells: Sequence[str]) -> str:
        if cells and all(map(NUMBERS.fullmatch, cells)):
            return "num"
        return "long" if max(map(len, cells), default=0) >= LONG else ""

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
    """An inline SVG of `pictures.svg`, what it shows, and its legend, which also has `num_particles` particles.

    Attributes:
        examples: the examples that the picture shows, to be folded out below it.
    """

    svg: str
    caption: str
    keys: Sequence[Key] = ()
    num_particles: int = 0
    examples: Table | None = None


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
    aligned = [str.rjust if kind == "num" else str.ljust for kind in table.classes]
    lines = [
        "  ".join(align(cell, width) for align, cell, width in zip(aligned, row, widths, strict=True)).rstrip()
        for row in rows
    ]
    title = [one_line(table.title)] if table.title else []
    return "\n".join([*title, *lines, *([] if table.rows else [table.empty])]) + "\n"


def page_title(folder: Path, command: str, model: str) -> str:
    """What a page is called, so that the pages of several folders can be told apart in a row of tabs.

    Args:
        folder: what holds the results.
        command: what made them, such as "eval nll".
        model: a folder, or an id of the hub.
    """
    return f"{folder.resolve().name}: {command} of {Path(model).name}"


def write_page(
    output: Path,
    *,
    title: str,
    lead: str,
    found: str,
    sections: Sequence[Section],
    words: Sequence[tuple[str, str]] = (),
    details: Mapping[str, Any] | None = None,
) -> Path:
    """Write one HTML page of `sections`, the most important one first; returns `output`.

    Args:
        title: as `page_title` makes it.
        lead: what the page is about, in a sentence or two. found: what the answer is, in words.
        words: (word, meaning) of the words that the sections use; shown before the first section.
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
    content = {"sections": sections, "words": words, "details": details or {}}
    return fill(output, "page.html.j2", title=title, lead=lead, found=found, **content)


def fill(output: Path, template: str, **content: Any) -> Path:
    """Write `template` of this package, filled with `content`; returns `output`, whose folder is made if need be."""
    loader = PackageLoader("renyi_engine.reports")
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, undefined=StrictUndefined)
    script, _, _ = loader.get_source(environment, "sort.js")
    checksum = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment.globals.update(particle_colours=particle_colours, shared=shared_words)
    environment.globals.update(script=script, script_checksum=checksum)
    page = environment.get_template(template).render(content)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, visible(page.replace("\r\n", "\n")))
    return output
