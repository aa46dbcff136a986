"""The prompts of an evaluation, read from files or hub data sets and divided into named splits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from renyi_engine.data import Row, columns_of, load_splits, missing_column


@dataclass(frozen=True)
class Prompt:
    """One row. `prompt_id` is its number among the prompts of all splits, from 0."""

    prompt_id: int
    split: str
    prompt: str
    category: str | None
    label: str | None


@dataclass(frozen=True)
class PromptColumns:
    """The columns of the data set that are read. A column `category` is read too, if there is one."""

    prompt: str = "prompt"
    split: str | None = None
    label: str | None = None


def read_prompts(
    names: Sequence[str],
    configs: Sequence[str] | None = None,
    columns: PromptColumns | None = None,
    limit: int | None = None,
) -> list[Prompt]:
    """The prompts of every data set in `names` (files, folders, hub ids), split by split, the first `limit` of each.

    Each configuration, or else each data set, is a split of its own; so is each split in a data set, and each value of
    the split column. The name of a split joins their names (of configurations and data sets only if there are several).

    Raises:
        ValueError: a data set cannot be read, is empty or lacks a column, or a row has no prompt, split or label.
    """
    columns = columns or PromptColumns()
    sources = [(name, config) for name in names for config in configs or (None,)]
    titles = [config or _stem(name) for name, config in sources]
    [(twice, count)] = Counter(titles).most_common(1)
    if count > 1:
        raise ValueError(f"dataset_name: {count} data sets are called {twice!r}, which names their splits; rename one")
    found: dict[str, list[_Fields]] = {}
    for (name, config), title in zip(sources, titles, strict=True):
        splits = load_splits(name, config, "dataset_name")
        for split, rows in splits.of.items():
            parts = [title] * (len(sources) > 1) + [split or ""] * (len(splits.of) > 1)
            for fields in _fields(splits.not_empty(rows), name, columns):
                same_split = found.setdefault("/".join([*parts, *fields.split]) or title, [])
                if limit is None or len(same_split) < limit:
                    same_split.append(fields)
    flat = [(split, fields) for split, same_split in found.items() for fields in same_split]
    return [Prompt(i, split, row.prompt, row.category, row.label) for i, (split, row) in enumerate(flat)]


class _Fields(NamedTuple):
    prompt: str
    category: str | None
    label: str | None
    split: list[str]


def _fields(rows: Sequence[Row], name: str, columns: PromptColumns) -> Iterator[_Fields]:
    wanted = [column for column in (columns.prompt, columns.split, columns.label) if column]
    if not set(wanted) <= set(columns_of(rows)):
        raise missing_column("dataset_name", columns_of(rows), [" + ".join(wanted)])
    for number, row in enumerate(rows):
        if not isinstance(row.get(columns.prompt) or "", str):
            got = f"{type(row[columns.prompt]).__name__} {str(row[columns.prompt])[:60]!r}"
            raise ValueError(f"dataset_name: {name}: row {number}: {columns.prompt}: expected a text; got {got}")
        texts = {column: "" if row.get(column) is None else str(row[column]) for column in wanted}
        for column, text in texts.items():
            if not text.strip():
                raise ValueError(f"dataset_name: {name}: row {number}: {column} is empty; fill it or leave the row out")
        category = row.get("category")  # an empty cell of a CSV file counts as no category
        yield _Fields(
            texts[columns.prompt],
            None if category in (None, "") else str(category),
            texts[columns.label] if columns.label else None,
            [texts[columns.split]] if columns.split else [],
        )


def _stem(name: str) -> str:
    """The name of a data set: of a file without its suffixes, else the last part of its path or id."""
    path = Path(name)
    return path.name.split(".")[0] if path.is_file() else path.name
