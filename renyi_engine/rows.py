"""The rows of a data set, as its files hold them: nothing is inferred, guessed or cached.

A row is a plain dict. A string in the file is a string in the row, whatever it looks like; a column that one row lacks
is not in that row. JSON and CSV are read here, also inside a folder; of a folder, `datasets` says which file belongs to
which split. A hub id is left to `datasets` altogether.
"""

from __future__ import annotations

import bz2
import contextlib
import csv
import dataclasses
import difflib
import glob
import gzip
import hashlib
import json
import lzma
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import yaml

if TYPE_CHECKING:
    import pyarrow

Row = dict[str, Any]

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
_UNPACKERS: Mapping[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_NOT_UNPACKED = {".zip", ".zst", ".lz4"}  # which `datasets` sees as data in a folder
# options that a folder's README.md may give to a reader, beside the files themselves
_READ_OPTIONS = {"json": {"field"}, "csv": {"sep", "delimiter"}, "parquet": set[str]()}
# what TRL and others call the rows of a file; to ask for that split of one is to ask for the file
_SPLIT_OF_A_FILE = "train"


@dataclass(frozen=True)
class Splits:
    """A data set that was read. What has no splits, such as a file, holds its rows under None.

    Attributes:
        argument: the setting that named it, for errors.
    """

    name: str
    argument: str
    of: Mapping[str | None, list[Row]]

    def __contains__(self, split: str) -> bool:
        return split in self.of

    def rows(self, split: str, argument: str, default: str) -> list[Row]:
        """The rows of one split; all of them where there are no splits and nobody asked for one.

        Args:
            split: its name. argument: the setting that holds it. default: what that setting is when nobody sets it.

        Raises:
            ValueError: there is no such split, or nothing in it.
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
        if not rows:
            raise ValueError(f"{self.argument}: {self.name} is empty; at least one row is needed")
        return rows


def load_splits(name: str, config_name: str | None, argument: str) -> Splits:
    """Every split of a data set: a local file, a folder, or a hub id.

    Raises:
        ValueError, in one line: it is not there or cannot be read; of a file, with the line that is to blame.
    """
    path = Path(name)
    found: Mapping[str | None, list[Row]]
    if config_name is not None and (path.is_file() or _is_saved(path)):
        raise ValueError(f"dataset_config: {name} has no configurations; leave --dataset_config out")
    try:
        if path.is_file():
            found = {None: _read_file(path, _kind(path))}
        elif path.is_dir():
            found = _read_folder(path, config_name)
        elif _suffix(path) in SUFFIXES:
            raise ValueError("no such file")
        elif path.is_absolute() or name.startswith(".") or name.count("/") > 1:
            raise ValueError("no such file or folder")
        else:
            found = _from_hub(name, config_name)
    except ValueError as error:
        raise ValueError(f"{argument}: {name}: {_one_line(error)}") from None
    return Splits(name, argument, found)


def columns_of(rows: Iterable[Row]) -> list[str]:
    """Every column that some row has, in the order in which they come up."""
    return list(dict.fromkeys(column for row in rows for column in row))


def missing_column(argument: str, columns: Iterable[str], wanted: Sequence[str]) -> ValueError:
    """An error for a data set in none of the `wanted` forms: how to convert it, or the nearest of its columns."""
    columns = list(columns)
    near = {w: difflib.get_close_matches(w, columns, n=1) for form in wanted for w in form.split(" + ")}
    hints = [f"is {found[0]!r} meant to be {name!r}?" for name, found in near.items() if found and found[0] != name]
    if "messages" in wanted and "conversations" in columns:
        hints = [
            "from ShareGPT's form: rename the column conversations to messages, and in each of its turns from to role, "
            "value to content, the role human to user and the role gpt to assistant"
        ]
    elif "messages" in wanted and {"instruction", "output"} <= set(columns):
        hints = [
            "from Alpaca's form: rename output to completion and instruction to prompt, and append to the prompt an "
            "empty line and input where that is not empty"
        ]
    return ValueError(
        f"{argument}: expected the columns {' or '.join(wanted)}; got {columns}" + (f"; {hints[0]}" if hints else "")
    )


def content_hash(rows: Iterable[Row]) -> str:
    """sha256 of what the rows hold, in their order; the order of columns is nothing."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=repr).encode() + b"\n")
    return digest.hexdigest()


# ---------------------------------------------------------------------- files


def csv_cells(path: Path, delimiter: str = ",") -> Iterator[tuple[int, list[str]]]:
    """(line at which it begins, counted from 1; cells) of every record of a CSV file that is not blank.

    Raises:
        ValueError: it cannot be opened, is not UTF-8, or a quotation does not end.
    """
    csv.field_size_limit(sys.maxsize)  # a cell may be a whole text
    reader = csv.reader(_lines(path), delimiter=delimiter, strict=True)
    begins = 1
    try:
        for cells in reader:
            if cells:
                yield begins, cells
            begins = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"line {begins}: broken CSV ({error})") from None


def _read_file(path: Path, kind: str, **options: Any) -> list[Row]:
    """The rows of one file. Raises ValueError, without the file's name."""
    if kind == "parquet":
        return _parquet(path)
    if kind == "csv":
        return _csv(path, options.get("sep") or options.get("delimiter") or ",")
    return _json(path, options.get("field"))


def _suffix(path: Path) -> str:
    return next((suffix for suffix in reversed(path.suffixes) if suffix not in _UNPACKERS), "")


def _kind(path: Path) -> str:
    if _suffix(path) not in SUFFIXES:
        raise ValueError(f"expected a file that ends in {', '.join(SUFFIXES)}")
    return {".jsonl": "json"}.get(_suffix(path), _suffix(path)[1:])


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The file's bytes, unpacked. What the system or an archive has to complain of is a ValueError."""
    if path.suffix in _NOT_UNPACKED:
        raise ValueError(f"a {path.suffix} archive is not read here; unpack it, or pack the file with gzip")
    try:
        with _UNPACKERS.get(path.suffix, lambda path: path.open("rb"))(path) as file:
            yield file
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = (os.strerror(error.errno) if isinstance(error, OSError) and error.errno else None) or str(error)
        raise ValueError(f"cannot be read ({reason})") from None


def _lines(path: Path) -> Iterator[str]:
    """Lines of a text, with their ends. A line ends in a line feed and nowhere else, as in an editor."""
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            yield _decoded(line, number)


def _decoded(text: bytes, first_line: int = 1) -> str:
    """UTF-8, with or without a byte-order mark. Raises ValueError that names the line; the first is `first_line`."""
    if first_line == 1 and text.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError("line 1: not UTF-8 but UTF-16; save the file as UTF-8")
    try:
        return text.decode("utf-8-sig" if first_line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line = first_line + text.count(b"\n", 0, error.start)
        raise ValueError(f"line {line}: not UTF-8 (byte 0x{text[error.start]:02x}); save the file as UTF-8") from None


def _json(path: Path, field: str | None) -> list[Row]:
    """A list of objects, or an object in each line: .json files are written in both ways."""
    with _opened(path) as file:
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if field is None and not start.startswith(b"["):
        return _json_lines(path)
    with _opened(path) as file:
        text = file.read()
    value = _parsed(_decoded(text), first_line=1)
    if field is not None:
        value = value.get(field) if isinstance(value, dict) else None
    if not isinstance(value, list):
        raise ValueError(f"expected a list of rows under {field!r}; got {type(value).__name__}")
    for number, row in enumerate(value):
        if not isinstance(row, dict):
            raise ValueError(f"row {number}: expected an object; got {type(row).__name__}")
    return value


def _json_lines(path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(_lines(path), start=1):
        line = line.strip()
        if not line:
            continue
        row = _parsed(line, number)
        if not isinstance(row, dict):
            raise ValueError(f"line {number}: expected an object; got {type(row).__name__}")
        rows.append(row)
    return rows


def _parsed(text: str, first_line: int) -> Any:
    try:
        value = json.loads(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError:
        raise ValueError(f"line {first_line}: a \\u escape is half a character, which no text can hold") from None
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        cut_short = error.pos >= len(text.rstrip())
        hint = "; a row has to be in one line, unless the file is one list in [ ]" if cut_short else ""
        raise ValueError(f"line {line}: broken JSON ({error.msg} at column {error.colno}){hint}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"line {first_line}: broken JSON ({error})") from None


def _csv(path: Path, delimiter: str) -> list[Row]:
    """Every cell is a string. The first line names the columns; one without a name is left out."""
    records = csv_cells(path, delimiter)
    _, header = next(records, (1, []))
    named = {name: index for index, name in enumerate(header) if name}
    for index, name in enumerate(header):
        if name and named[name] != index:
            raise ValueError(f"line 1: two columns are called {name!r}; rename one")
    rows = []
    for line, cells in records:
        if len(cells) != len(header):
            raise ValueError(f"line {line}: expected {len(header)} cells, as line 1 has; got {len(cells)}")
        rows.append({name: cells[index] for name, index in named.items()})
    return rows


def _parquet(path: Path) -> list[Row]:
    import pyarrow.parquet

    with _opened(path) as file:
        try:
            return _from_arrow(pyarrow.parquet.read_table(pyarrow.BufferReader(file.read())))
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"no whole parquet file ({_one_line(error)})") from None


# ---------------------------------------------------------------------- folders, the hub, arrow


def _is_saved(path: Path) -> bool:
    """Whether `datasets` wrote it with save_to_disk."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _read_folder(path: Path, config_name: str | None) -> dict[str | None, list[Row]]:
    import datasets

    if _is_saved(path):
        with _told_by_datasets():
            loaded = datasets.load_from_disk(str(path))
            by_split = loaded if isinstance(loaded, Mapping) else {None: loaded}
            return {split: _from_dataset(dataset) for split, dataset in by_split.items()}
    # a cache of its own, which goes with it: the files may be others by the next time
    with tempfile.TemporaryDirectory() as scratch, _told_by_datasets():
        folder = str(_plainly_named(path, Path(scratch)))
        builder = datasets.load_dataset_builder(folder, config_name, cache_dir=scratch)
        options = _options(builder.config)
        if builder.name not in _READ_OPTIONS or (builder.name == "parquet" and options):
            loaded = datasets.load_dataset(folder, config_name, cache_dir=scratch, keep_in_memory=True)
            return {str(split): _from_dataset(dataset) for split, dataset in loaded.items()}
        if strange := sorted(options.keys() - _READ_OPTIONS[builder.name]):
            raise ValueError(f"README.md sets {strange[0]} for its {builder.name} files, which is not understood here")
        found: dict[str | None, list[Row]] = {}
        for split, files in builder.config.data_files.items():
            found[str(split)] = []
            for file in files:
                try:
                    found[str(split)] += _read_file(Path(file), builder.name, **options)
                except ValueError as error:
                    raise ValueError(f"{os.path.relpath(file, folder)}: {error}") from None
        return found


def _from_hub(name: str, config_name: str | None) -> dict[str | None, list[Row]]:
    import datasets

    with _told_by_datasets():
        return {str(split): _from_dataset(part) for split, part in datasets.load_dataset(name, config_name).items()}


@contextlib.contextmanager
def _told_by_datasets() -> Iterator[None]:
    """What `datasets` raises, as a ValueError of one line."""
    import datasets

    datasets.disable_progress_bars()
    try:
        yield
    except StopIteration:  # what a file without a line makes of a loader
        raise ValueError("is empty; at least one row is needed") from None
    except (OSError, yaml.YAMLError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"cannot be read as a data set ({_one_line(error)})") from None


def _plainly_named(folder: Path, scratch: Path) -> Path:
    """`folder`, or links to its files where `datasets` would take its name for a pattern: mine[1] also means mine1."""
    if not glob.has_magic(str(folder.resolve())):
        return folder
    return Path(shutil.copytree(folder.resolve(), scratch / "data", copy_function=os.symlink))


def _options(config: Any) -> dict[str, Any]:
    """What a builder's configuration says beside its name and its files."""
    usual = type(config)()
    names = {field.name for field in dataclasses.fields(config)} - {"name", "version", "data_dir", "data_files"}
    values = {name: getattr(config, name) for name in names - {"description"}}
    return {name: value for name, value in values.items() if value != getattr(usual, name)}


def _from_dataset(dataset: Any) -> list[Row]:
    # as arrow, in parts: nothing is decoded that nobody reads, such as pictures
    return [row for table in dataset.with_format("arrow").iter(1000) for row in _from_arrow(table)]


def _from_arrow(table: pyarrow.Table) -> list[Row]:
    fields = {field.name: field.type for field in table.schema}
    return [{name: _plain(fields[name], value) for name, value in row.items()} for row in table.to_pylist()]


def _plain(kind: pyarrow.DataType, value: Any) -> Any:
    """Without the nulls that arrow puts into a struct where the row had no such key."""
    import pyarrow

    if value is None:
        return None
    if pyarrow.types.is_struct(kind):
        return {f.name: _plain(f.type, value[f.name]) for f in kind if value[f.name] is not None}
    if isinstance(value, list) and hasattr(kind, "value_type"):
        return [_plain(kind.value_type, item) for item in value]
    if getattr(kind, "extension_name", None) == "arrow.json":
        return json.loads(value)
    return value


def _one_line(error: BaseException) -> str:
    cause = error.__cause__ or error
    return " ".join(str(cause).split()) or type(cause).__name__
