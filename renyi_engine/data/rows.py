"""The rows of a data set, split by split: from a file, from a folder, or from the hub.

A row is a plain dict that holds what its file holds: no types are guessed. `row_files` reads the files. For a folder,
`datasets` only says which file belongs to which split. A data set of the hub is read by `datasets`, with its cache.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from renyi_engine.core import reason
from renyi_engine.data.row_files import SUFFIXES, Row, from_arrow, kind_of, read_file, suffix

# options that a folder's README.md may set for the reader of its files
_READ_OPTIONS = {"json": {"field"}, "csv": {"sep", "delimiter"}, "parquet": set[str]()}
# TRL and others call the rows of a file its split train, so a request for that split gets the file
_SPLIT_OF_A_FILE = "train"


@dataclass(frozen=True)
class Splits:
    """`of`: the rows of each split of the data set `name`. Data without splits, as in a file, have one split, None.
    Errors name `argument`, the setting that holds the name."""

    name: str
    argument: str
    of: Mapping[str | None, list[Row]]

    def __contains__(self, split: str) -> bool:
        return split in self.of

    def rows(self, split: str, argument: str, default: str) -> list[Row]:
        """The rows of one split. If the data set has no splits and none is asked for: all its rows.

        `argument` is the setting that holds the name of the split, and `default` its default.

        Raises:
            ValueError: there is no such split, or it is empty.
        """
        found = self.of.get(split)
        if None in self.of and split in (default, _SPLIT_OF_A_FILE):
            found = self.of[None]
        if found is None:
            names = sorted(name for name in self.of if name is not None)
            raise ValueError(
                f"{argument}: {self.name} has no split {split!r}; "
                + (f"it has {names}" if names else f"it has no splits at all: leave --{argument} out")
            )
        return self.not_empty(found)

    def not_empty(self, rows: list[Row]) -> list[Row]:
        """The rows. Raises ValueError if there is none."""
        if not rows:
            raise ValueError(f"{self.argument}: {self.name} is empty; at least one row is needed")
        return rows


def load_splits(name: str, config_name: str | None, argument: str) -> Splits:
    """Every split of a data set. `name` is a local file, a folder, or a hub id.

    Raises:
        ValueError: the data set is not there or cannot be read. The message is one line, and names the line of a file
            that is broken.
    """
    path = Path(name)
    found: Mapping[str | None, list[Row]]
    try:
        has_no_configurations = path.is_file() or _is_saved(path)
    except OSError as error:  # such as a name that is too long
        raise ValueError(f"{argument}: {name[:200]}: {os.strerror(error.errno or 0)}") from None
    if config_name is not None and has_no_configurations:
        raise ValueError(f"dataset_config: {name} has no configurations; leave --dataset_config out")
    try:
        if path.is_file():
            found = {None: read_file(path, kind_of(path))}
        elif path.is_dir():
            found = _read_folder(path, config_name)
        elif suffix(path) in SUFFIXES:
            raise ValueError("no such file")
        elif path.is_absolute() or name.startswith(".") or name.count("/") > 1:
            raise ValueError("no such file or folder")
        else:
            found = _from_hub(name, config_name)
    except ValueError as error:
        raise ValueError(f"{argument}: {name}: {reason(error)}") from None
    except MemoryError:
        raise ValueError(f"{argument}: {name}: does not fit into memory; give a part of it") from None
    return Splits(name, argument, found)


def given_rows(dataset: Any, argument: str) -> list[Row]:
    """The rows of a `datasets.Dataset`, or of a sequence of dicts, that Python code hands over as `argument`.

    Raises:
        TypeError: it is neither. ValueError: it is empty.
    """
    if isinstance(dataset, Sequence) and not isinstance(dataset, str):
        rows = list(dataset)
    elif hasattr(dataset, "with_format") and hasattr(dataset, "num_rows") and not isinstance(dataset, Mapping):
        shown = dataset.format  # what its owner made of it with set_transform or set_format
        rows = list(dataset) if shown["type"] == "custom" else _from_dataset(dataset.select_columns(shown["columns"]))
    else:
        rows = [None]
    if not all(isinstance(row, Mapping) for row in rows):
        raise TypeError(
            f"{argument}: expected a datasets.Dataset, or a sequence of rows, each a dict; got {type(dataset).__name__}"
        )
    if not rows:
        raise ValueError(f"{argument}: it is empty; at least one row is needed")
    return [dict(row) for row in rows]


def content_hash(rows: Iterable[Row]) -> str:
    """The sha256 of what the rows hold, in their order. The order of columns does not matter."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=repr).encode() + b"\n")
    return digest.hexdigest()


# ---------------------------------------------------------------------- folders and the hub


def _is_saved(path: Path) -> bool:
    """Whether `datasets` wrote the folder, with save_to_disk."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _read_folder(path: Path, config_name: str | None) -> dict[str | None, list[Row]]:
    import datasets

    if _is_saved(path):
        with _told_by_datasets():
            loaded = datasets.load_from_disk(str(path))
            by_split = loaded if isinstance(loaded, Mapping) else {None: loaded}
            return {split: _from_dataset(dataset) for split, dataset in by_split.items()}
    # the cache of `datasets` is deleted at the end, because the files may have changed by the next time
    with tempfile.TemporaryDirectory() as scratch, _told_by_datasets():
        folder = str(_plainly_named(path, Path(scratch)))
        builder = datasets.load_dataset_builder(folder, config_name, cache_dir=scratch)
        options = _options(builder.config)
        if builder.name not in _READ_OPTIONS or (builder.name == "parquet" and options):
            loaded = datasets.load_dataset(folder, config_name, cache_dir=scratch, keep_in_memory=True)
            return {str(split): _from_dataset(dataset) for split, dataset in loaded.items()}
        if strange := sorted(options.keys() - _READ_OPTIONS[builder.name]):
            raise ValueError(f"README.md sets {strange[0]} for its {builder.name} files; this is not read, remove it")
        found: dict[str | None, list[Row]] = {}
        for split, files in builder.config.data_files.items():
            found[str(split)] = []
            for file in files:
                try:
                    found[str(split)] += read_file(Path(file), builder.name, **options)
                except ValueError as error:
                    raise ValueError(f"{os.path.relpath(file, folder)}: {error}") from None
        return found


def _from_hub(name: str, config_name: str | None) -> dict[str | None, list[Row]]:
    import datasets

    with _told_by_datasets():
        return {str(split): _from_dataset(part) for split, part in datasets.load_dataset(name, config_name).items()}


@contextlib.contextmanager
def _told_by_datasets() -> Iterator[None]:
    """Inside the block, an error of `datasets` becomes a ValueError with a message of one line."""
    import datasets

    datasets.disable_progress_bars()
    try:
        yield
    except StopIteration:  # `datasets` raises this for a file without a line
        raise ValueError("is empty; at least one row is needed") from None
    except (ValueError, MemoryError):
        raise
    except Exception as error:  # every kind of file has its own reader, with its own errors
        raise ValueError(f"cannot be read as a data set ({reason(error.__cause__ or error)})") from None


def _plainly_named(folder: Path, scratch: Path) -> Path:
    """The folder, or a folder of links to its files if `datasets` takes its name for a pattern: mine[1] means mine1."""
    if not glob.has_magic(str(folder.resolve())):
        return folder
    return Path(shutil.copytree(folder.resolve(), scratch / "data", copy_function=os.symlink))


def _options(config: Any) -> dict[str, Any]:
    """The options that a builder's configuration sets to other values than the defaults, without its name and files."""
    usual = type(config)()
    names = {field.name for field in dataclasses.fields(config)} - {"name", "version", "data_dir", "data_files"}
    values = {name: getattr(config, name) for name in names - {"description"}}
    return {name: value for name, value in values.items() if value != getattr(usual, name)}


def _from_dataset(dataset: Any) -> list[Row]:
    # in arrow tables of 1000 rows, because `datasets` decodes no pictures and no sound in this format
    return [row for table in dataset.with_format("arrow").iter(1000) for row in from_arrow(table)]
