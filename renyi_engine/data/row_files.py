"""Reads the rows of one file: JSON, JSON Lines, CSV or parquet, compressed or not.

Values stay what they are in the file: a string stays a string, even if it looks like a number. A column that one row
lacks is not in that row. Errors name the line, counted as an editor counts lines. The caller adds the file's name.
"""

from __future__ import annotations

import bz2
import contextlib
import csv
import gzip
import json
import lzma
import os
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from renyi_engine.core import reason

if TYPE_CHECKING:
    import pyarrow

Row = dict[str, Any]

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
_UNPACKERS: Mapping[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_NOT_UNPACKED = {".zip", ".zst", ".lz4"}  # `datasets` takes such archives for data in a folder


def read_file(path: Path, kind: str, **options: Any) -> list[Row]:
    """The rows of one file. `kind`: see `kind_of`. The options are those of `datasets`: `field` of JSON, `sep` of CSV.

    Raises:
        ValueError: the file cannot be read, or its content is broken. The message is one line.
    """
    if kind == "parquet":
        return _parquet(path)
    if kind == "csv":
        return _csv(path, options.get("sep") or options.get("delimiter") or ",")
    return _json(path, options.get("field"))


def suffix(path: Path) -> str:
    """The ending of the name that says what kind of file it is: ".jsonl" for rows.jsonl.gz."""
    return next((ending for ending in reversed(path.suffixes) if ending not in _UNPACKERS), "")


def kind_of(path: Path) -> str:
    """ "json", "csv" or "parquet". Raises ValueError if the file is none of them."""
    if suffix(path) not in SUFFIXES:
        raise ValueError(f"expected a file that ends in {', '.join(SUFFIXES)}")
    return {".jsonl": "json"}.get(suffix(path), suffix(path)[1:])


def csv_cells(path: Path, delimiter: str = ",") -> Iterator[tuple[int, list[str]]]:
    """(number of its first line, counted from 1; cells) of every record of a CSV file. Blank lines are left out.

    Raises:
        ValueError: the file cannot be opened, is not UTF-8, or has a quotation that does not end.
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


def from_arrow(table: pyarrow.Table) -> list[Row]:
    """The rows of a table, without the nulls that arrow puts into a struct for keys that the row did not have."""
    fields = {field.name: field.type for field in table.schema}
    return [{name: _plain(fields[name], value) for name, value in row.items()} for row in table.to_pylist()]


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The file, uncompressed, to read bytes from. Raises ValueError for an error of the system or a broken archive."""
    if path.suffix in _NOT_UNPACKED:
        raise ValueError(f"a {path.suffix} archive is not read here; unpack it, or compress the file with gzip")
    try:
        with _UNPACKERS.get(path.suffix, lambda path: path.open("rb"))(path) as file:
            yield file
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        why = (os.strerror(error.errno) if isinstance(error, OSError) and error.errno else None) or str(error)
        raise ValueError(f"cannot be read ({why})") from None


def _lines(path: Path) -> Iterator[str]:
    """The lines of a text file, each with its end. Only a line feed ends a line, as in an editor."""
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            yield _decoded(line, number)


def _decoded(text: bytes, first_line: int = 1) -> str:
    """The text of UTF-8 bytes, without a byte-order mark. A ValueError names the line; `first_line` is the first."""
    if first_line == 1 and text.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError("line 1: not UTF-8 but UTF-16; save the file as UTF-8")
    try:
        return text.decode("utf-8-sig" if first_line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line = first_line + error.object.count(b"\n", 0, error.start)
        raise ValueError(f"line {line}: not UTF-8 (byte 0x{error.object[error.start]:02x}); save it as UTF-8") from None


def _json(path: Path, field: str | None) -> list[Row]:
    """The rows of a list of objects, or of one object in each line: .json files come in both forms."""
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
        raise ValueError(f"line {first_line}: a \\u escape is half a character; write the whole character") from None
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        cut_short = error.pos >= len(text.rstrip())
        hint = "; a row has to be in one line, unless the file is one list in [ ]" if cut_short else ""
        raise ValueError(f"line {line}: broken JSON ({error.msg} at column {error.colno}){hint}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"line {first_line}: broken JSON ({error})") from None


def _csv(path: Path, delimiter: str) -> list[Row]:
    """The first line names the columns. Every cell is a string. A column without a name is left out."""
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
            return from_arrow(pyarrow.parquet.read_table(pyarrow.BufferReader(file.read())))
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"not a whole parquet file ({reason(error)})") from None


def _plain(kind: pyarrow.DataType, value: Any) -> Any:
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
