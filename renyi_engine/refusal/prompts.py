"""The prompts of an evaluation: files or hub data sets, taken apart into named splits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from renyi_engine.data import load_splits, missing_column, rows_of


@dataclass(frozen=True)
class Prompt:
    """One row. `prompt_id` counts the prompts of all splits from 0."""

    prompt_id: int
    split: str
    prompt: str
    category: str | None
    label: str | None


@dataclass(frozen=True)
class PromptColumns:
    """Which columns of the data set hold what; `category` is taken where there is one."""

    prompt: str = "prompt"
    split: str | None = None
    label: str | None = None


def read_prompts(
    names: Sequence[str],
    configs: Sequence[str] | None = None,
    columns: PromptColumns | None = None,
    limit: int | None = None,
) -> list[Prompt]:
    """The prompts of every data set in `names` (files, folders, hub ids), split by split, at most `limit` a split.

    A split is what a data set calls one, and each of its `configs`, each data set of several, and each value of the
    split column makes splits of its own; its name says as much of this as there is more than one of.

    Raises:
        ValueError: a data set cannot be read, is empty or lacks a column; a row has no prompt, split or label.
    """
    columns = columns or PromptColumns()
    sources = [(name, config) for name in names for config in configs or (None,)]
    titles = [config or _stem(name) for name, config in sources]
    [(twice, count)] = Counter(titles).most_common(1)
    if count > 1:
        raise ValueError(f"dataset_name: {count} data sets are called {twice!r}; rename one, as splits go by that name")
    found: dict[str, list[_Fields]] = {}
    for (name, config), title in zip(sources, titles, strict=True):
        splits = load_splits(name, "prompts", config, "dataset_name")
        for split in splits:
            parts = [title] * (len(sources) > 1) + [split] * (len(splits) > 1)
            for fields in _fields(rows_of(splits, split, name, "dataset_name"), name, columns):
                same_split = found.setdefault("/".join([*parts, *fields.split]) or title, [])
                if limit is None or len(same_split) < limit:
                    same_split.append(fields)
    flat = [(split, fields) for split, rows in found.items() for fields in rows]
    return [Prompt(i, split, row.prompt, row.category, row.label) for i, (split, row) in enumerate(flat)]


class _Fields(NamedTuple):
    prompt: str
    category: str | None
    label: str | None
    split: list[str]


def _fields(rows: Any, name: str, columns: PromptColumns) -> Iterator[_Fields]:
    wanted = [column for column in (columns.prompt, columns.split, columns.label) if column]
    if not set(wanted) <= set(rows.column_names):
        raise missing_column("dataset_name", rows.column_names, [" + ".join(wanted)])
    for number, row in enumerate(rows):
        texts = {column: "" if row[column] is None else str(row[column]) for column in wanted}
        for column, text in texts.items():
            if not text.strip():
                raise ValueError(f"dataset_name: {name}: row {number}: {column} is empty; fill it or leave the row out")
        category = row.get("category")
        yield _Fields(
            texts[columns.prompt],
            None if category is None else str(category),
            texts[columns.label] if columns.label else None,
            [texts[columns.split]] if columns.split else [],
        )


def _stem(name: str) -> str:
    """What a data set is called: a file without its endings, else the last part of its path or id."""
    path = Path(name)
    return path.name.split(".")[0] if path.is_file() else path.name
