"""A page as a reader of HTML sees it, and a picture as a reader of its axes does."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np

import renyi_engine.reports

SCRIPT = Path(renyi_engine.reports.__file__).parent / "templates" / "sort.js"
VOID = {"meta", "br", "hr", "img", "link", "input", "col"}


class Page(HTMLParser):
    """Collects tags, ids, references and the text that is shown; fails where a tag closes that was not open."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open):
            self.text += " " + " ".join(data.split())

    def values(self, *names: str) -> list[str]:
        return [value for _, attrs in self.tags for name, value in attrs.items() if name in names and value]


def scripts_of(path: Path) -> list[str]:
    return re.findall(r"<script>(.*?)</script>", path.read_text(encoding="utf-8"), flags=re.DOTALL)


def assert_only_our_script(path: Path) -> None:
    """One script is on the page, the one that sorts tables, and the page forbids a browser to run any other."""
    [script] = scripts_of(path)
    assert script == SCRIPT.read_text(encoding="utf-8")
    page = Page(path)
    assert [attrs for tag, attrs in page.tags if tag == "script"] == [{}]
    checksum = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    [policy] = [attrs["content"] for _, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in (policy or "").split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["script-src"] == f"'sha256-{checksum}'"
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]


def pictures_of(path: Path) -> list[str]:
    return re.findall(r"<svg.*?</svg>", path.read_text(encoding="utf-8"), flags=re.DOTALL)


def group(svg: str, identifier: str) -> str:
    """What the element <g id=identifier> holds."""
    depth, start = 0, re.search(rf'<g id="{re.escape(identifier)}"[^>/]*>', svg)
    assert start, identifier
    for tag in re.finditer(r"<g\b[^>/]*>|</g>", svg[start.start() :]):
        depth += -1 if tag[0] == "</g>" else 1
        if depth == 0:
            return svg[start.end() : start.start() + tag.start()]
    raise AssertionError(identifier)


def read_values(svg: str, axis: str, positions: np.ndarray) -> np.ndarray:
    """What the ticks of the axis, x or y, say of positions in the drawing; percentages as shares."""
    ticks = []
    for identifier in re.findall(rf'<g id="([\w-]+-{axis}tick_\d+)">', svg):
        tick = group(svg, identifier)
        label = re.search(r"<text[^>]*>([^<]+)</text>", tick)
        mark = re.search(rf'<use [^>]*\b{axis}="([^"]+)"', tick)
        if label and mark:
            number = float(label[1].strip("%").replace("−", "-")) / (100 if "%" in label[1] else 1)
            ticks.append((float(mark[1]), number))
    slope, offset = np.polyfit(*np.array(ticks).T, 1)
    return slope * positions + offset
