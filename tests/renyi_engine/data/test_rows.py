"""A row is what its file holds: nothing is inferred or remembered, and what is broken is named with its line."""

from __future__ import annotations

import bz2
import datetime
import gzip
import json
import lzma
import os
import subprocess
import sys

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from renyi_engine.data.columns import columns_of
from renyi_engine.data.rows import Splits, content_hash, load_splits

ROWS = [{"text": "a", "n": 1}, {"text": "b", "n": 2}, {"text": "c", "n": 3}]
# what a reader that infers types makes something else of
LOOKS_LIKE = [
    "2024-01-31",
    "2024-01-31T12:00:00",
    "007",
    "1e3",
    "N/A",
    "None",
    "null",
    "NaN",
    "true",
    "",
    " x ",
    "12:30",
]


@pytest.fixture
def write(tmp_path):
    """write(name, text or bytes) -> path, its folders made."""

    def make(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return make


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def load(path, config_name=None):
    return load_splits(str(path), config_name, "dataset_name").of


def refused(path, config_name=None):
    with pytest.raises(ValueError) as error:
        load(path, config_name)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------------- what is read


@pytest.mark.parametrize(
    "form", ["json", "lines.json", "jsonl", "jsonl.gz", "jsonl.bz2", "jsonl.xz", "parquet", "saved"]
)
def test_every_form_with_types_gives_the_same_rows(tmp_path, write, form):
    path = tmp_path / f"train.{form}"
    if form == "json":
        write(path.name, json.dumps(ROWS, indent=1))
    elif form == "parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(path)
    elif form == "saved":
        datasets.Dataset.from_list(ROWS).save_to_disk(path)
    else:
        pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}.get(path.suffix, bytes)
        write(path.name, pack(lines(ROWS).encode()))
    splits = load_splits(str(path), None, "dataset_name")
    assert splits.rows("train", "dataset_train_split", "train") == ROWS
    assert "train" not in splits  # it has none, and is all of it


@pytest.mark.parametrize("form", ["json", "jsonl", "csv", "folder"])
def test_a_string_in_the_file_is_that_string_in_the_row(write, form):
    rows = [{"text": text, "other": "x"} for text in LOOKS_LIKE]
    if form == "csv":
        path = write("rows.csv", "text,other\n" + "".join(f"{text},x\n" for text in LOOKS_LIKE))
    elif form == "json":
        path = write("rows.json", json.dumps(rows))
    else:
        path = write("rows/train.jsonl", lines(rows))
    folder = form == "folder"
    [found] = load(path.parent if folder else path).values()
    assert found == rows


def test_types_of_json_and_parquet_are_their_own(write, tmp_path):
    path = write(
        "rows.jsonl",
        '{"a": 1, "b": 1.0, "c": true, "d": null, "e": [1, "x", {"f": null}], "f": 12345678901234567890}\n',
    )
    [row] = load(path)[None]
    assert row == {"a": 1, "b": 1.0, "c": True, "d": None, "e": [1, "x", {"f": None}], "f": 12345678901234567890}
    assert isinstance(row["a"], int)
    assert isinstance(row["b"], float)
    when = datetime.datetime(2024, 1, 31)
    pyarrow.parquet.write_table(pyarrow.table({"when": [when], "text": ["2024-01-31"]}), tmp_path / "rows.parquet")
    assert load(tmp_path / "rows.parquet") == {None: [{"when": when, "text": "2024-01-31"}]}


def test_columns_that_nobody_reads_can_hold_anything(write):
    mixed = [
        {"text": "a", "x": None},
        {"text": "b", "x": "word"},
        {"text": "c", "x": 3},
        {"text": "d", "x": {"y": []}},
        {"text": "e"},
    ]
    path = write("rows.jsonl", lines(mixed))
    assert load(path) == {None: mixed}
    assert columns_of(mixed) == ["text", "x"]
    for number, row in enumerate(mixed):
        write(f"folder/train-{number}.jsonl", lines([row]))
    assert load(path.parent / "folder") == {"train": mixed}


def test_only_arrow_loses_the_nulls_that_it_put_into_structs(write, tmp_path):
    calls = [{"name": "f", "arguments": {"city": "Oslo"}}, {"name": "g", "arguments": {"day": "today", "hour": None}}]
    rows = [
        {"messages": [{"role": "assistant", "content": "hi", "tool_calls": calls}], "tools": None},
        {"messages": [{"role": "user"}], "tools": "[]"},
    ]
    assert load(write("rows.jsonl", lines(rows))) == {None: rows}  # an explicit null stays
    without = json.loads(json.dumps(rows))
    del without[0]["messages"][0]["tool_calls"][1]["arguments"]["hour"]  # arrow cannot tell it from one that it made up
    table = pyarrow.Table.from_pylist(rows)
    assert table.to_pylist() != rows  # it did make some up
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    assert load(tmp_path / "rows.parquet") == {None: without}
    datasets.Dataset(table).save_to_disk(tmp_path / "saved")
    assert load(tmp_path / "saved") == {None: without}


def test_columns_of_json_text_in_arrow_are_read_as_json(tmp_path):
    features = datasets.Features({"tools": datasets.Json(), "text": datasets.Value("string")})
    made = datasets.Dataset.from_dict({"tools": [{"a": None}, {"b": [1]}], "text": ["x", "y"]}, features=features)
    made.save_to_disk(tmp_path / "saved")
    assert load(tmp_path / "saved") == {None: [{"tools": {"a": None}, "text": "x"}, {"tools": {"b": [1]}, "text": "y"}]}


def test_a_hub_id_goes_through_datasets_and_pictures_stay_undecoded(monkeypatch):
    table = pyarrow.table({"m": [[{"a": "x", "b": None}]], "picture": [{"bytes": b"no picture", "path": None}]})
    features = datasets.Features(
        {"m": [{"a": datasets.Value("string"), "b": datasets.Value("string")}], "picture": datasets.Image()}
    )
    made = datasets.Dataset(table.cast(features.arrow_schema))
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config: datasets.DatasetDict({"train": made}))
    assert load("owner/name") == {"train": [{"m": [{"a": "x"}], "picture": {"bytes": b"no picture"}}]}


def test_cells_of_csv_keep_line_ends_quotes_and_long_texts(write):
    long = "z" * 300_000
    path = write("rows.csv", f'\ufeffprompt,completion,,\r\n"one\r\ntwo","say ""hi""",,\r\n{long},é,,3\r\n\r\n')
    expected = [{"prompt": "one\r\ntwo", "completion": 'say "hi"'}, {"prompt": long, "completion": "é"}]
    assert load(path) == {None: expected}  # columns without a name, as spreadsheets append them, are left out


def test_lines_end_in_line_feeds_only_and_a_byte_order_mark_is_fine(write):
    rows = [{"text": "a\u2028b\x85c"}, {"text": "é"}]
    text = "\ufeff" + "\r\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    assert load(write("rows.jsonl", text)) == {None: rows}
    assert load(write("rows.json", "\ufeff \n" + json.dumps(rows, ensure_ascii=False))) == {None: rows}


# ---------------------------------------------------------------------- from where


def test_a_path_is_a_path_and_no_pattern(write, tmp_path):
    right, wrong = [{"text": "right"}], [{"text": "wrong"}]
    for name in ("mine[1]", "mi*", "mi?e1"):
        assert load(write(f"{name}.jsonl", lines(right))) == {None: right}
        assert load(write(f"{name}/train.jsonl", lines(right)).parent) == {"train": right}
        datasets.Dataset.from_list(right).save_to_disk(tmp_path / f"saved {name}")
        write("mine1.jsonl", lines(wrong))
        write("mine1/train.jsonl", lines(wrong))
        datasets.Dataset.from_list(wrong).save_to_disk(tmp_path / "saved mine1")
        assert load(tmp_path / f"{name}.jsonl") == {None: right}
        assert load(tmp_path / name) == {"train": right}
        assert load(tmp_path / f"saved {name}") == {None: right}
    assert load(write("in/mine[1]/deep/test.jsonl", lines(right)).parents[1]) == {"test": right}


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "folder/train.jsonl", "folder/train.txt"])
def test_a_file_that_was_replaced_is_read_anew(write, name):
    path = write(name, 'text\n"aaa"\n' if not name.endswith("jsonl") else '{"text": "aaa"}\n')
    stamp = os.stat(path)
    source = path.parent if "/" in name else path
    before = load(source)
    path.write_bytes(path.read_bytes().replace(b"aaa", b"bbb"))
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert os.stat(path).st_size == stamp.st_size
    assert repr(load(source)) == repr(before).replace("aaa", "bbb") != repr(before)


def test_a_folder_has_the_splits_that_datasets_sees_in_it(write, tmp_path):
    write("plain/train.jsonl", lines(ROWS))
    write("plain/data/test-0.jsonl", lines(ROWS[:1]))
    write("plain/data/test-1.jsonl", lines(ROWS[1:]))
    assert load(tmp_path / "plain") == {"train": ROWS, "test": ROWS}
    made = datasets.DatasetDict({name: datasets.Dataset.from_list(ROWS) for name in ("train", "held")})
    made.save_to_disk(tmp_path / "saved")
    assert load(tmp_path / "saved") == {"train": ROWS, "held": ROWS}
    (tmp_path / "tables").mkdir()
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "tables" / "validation.parquet")
    assert load(tmp_path / "tables") == {"validation": ROWS}
    write("tabs/train.tsv", "text\tn\n007\t1,5\n")
    assert load(tmp_path / "tabs") == {"train": [{"text": "007", "n": "1,5"}]}


def test_a_folders_readme_says_what_its_configurations_are(write, tmp_path):
    write(
        "cards/README.md",
        "---\nconfigs:\n- config_name: one\n  sep: ';'\n  data_files: x/*.csv\n"
        "- config_name: two\n  data_files:\n  - split: dev\n    path: y.csv\n"
        "- config_name: odd\n  skiprows: 3\n  data_files: y.csv\n---\n",
    )
    write("cards/x/q.csv", "a;b\n007;2\n")
    write("cards/y.csv", "a,b\n1,N/A\n")
    assert load(tmp_path / "cards", "one") == {"train": [{"a": "007", "b": "2"}]}
    assert load(tmp_path / "cards", "two") == {"dev": [{"a": "1", "b": "N/A"}]}
    assert "Available: ['one', 'two', 'odd']" in refused(tmp_path / "cards", "three")
    assert "README.md sets skiprows for its csv files; this is not read, remove it" in refused(
        tmp_path / "cards", "odd"
    )


# ---------------------------------------------------------------------- splits


def test_a_file_has_no_splits_and_says_so_when_it_is_asked_for_one(write):
    splits = load_splits(str(write("rows.jsonl", lines(ROWS))), None, "dataset_name")
    for asked, default in (("train", "train"), ("test", "test"), ("train", "test")):
        assert splits.rows(asked, "dataset_split", default) == ROWS
    with pytest.raises(
        ValueError, match=r"^dataset_split: .*rows.jsonl has no split 'validation'; it has no splits at"
    ) as error:
        splits.rows("validation", "dataset_split", "train")
    assert "leave --dataset_split out" in str(error.value)


def test_a_missing_split_and_an_empty_one_are_told_apart():
    splits = Splits("x", "dataset_name", {"train": [], "validation": ROWS})
    with pytest.raises(ValueError, match=r"^dataset_split: x has no split 'test'; it has \['train', 'validation'\]"):
        splits.rows("test", "dataset_split", "test")
    with pytest.raises(ValueError, match=r"^dataset_name: x is empty; at least one row is needed"):
        splits.rows("train", "dataset_split", "train")


def test_a_file_has_no_configurations(write, tmp_path):
    path = write("rows.jsonl", lines(ROWS))
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "saved")
    for one in (path, tmp_path / "saved"):
        assert refused(one, "main") == f"dataset_config: {one} has no configurations; leave --dataset_config out"


# ---------------------------------------------------------------------- what is broken


GOOD = '{"text": "a"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.jsonl", GOOD * 6 + '{"text": }\n' + GOOD, "line 7: broken JSON (Expecting value at column 10)"),
        ("r.jsonl", "\ufeff" + GOOD + "\r\n\n" + '{"text": "a}\n', "line 4: broken JSON (Unterminated string"),
        ("r.jsonl", GOOD + '{"text":\n"a"}\n', "(Expecting value at column 9); a row has to be in one line"),
        ("r.jsonl", GOOD + "[1]\n", "line 2: expected an object; got list"),
        ("r.jsonl", GOOD + '{"text": "\\ud83d"}\n', "line 2: a \\u escape is half a character"),
        ("r.jsonl", GOOD + "[" * 100_000 + "\n", "line 2: "),
        ("r.jsonl", GOOD.encode() + '{"text": "é"}\n'.encode("latin-1"), "line 2: not UTF-8 (byte 0xe9); save"),
        ("r.jsonl", (GOOD * 2).encode("utf-16"), "line 1: not UTF-8 but UTF-16; save the file as UTF-8"),
        ("r.json", '[\n{"text": "a"},\n{"text" "b"}\n]', "line 3: broken JSON (Expecting ':' delimiter at column 9)"),
        ("r.json", '[\n{"text": "a"},\n{"text": "é"}]'.encode("latin-1"), "line 3: not UTF-8 (byte 0xe9)"),
        ("r.jsonl", b"\xef\xbb\xbf{\"a\": \"\xe9\"}", "line 1: not UTF-8 (byte 0xe9)"),
        ("r.json", "[1]", "row 0: expected an object; got int"),
        ("r.json", '{\n "data": []\n}', "a row has to be in one line, unless the file is one list in [ ]"),
        ("r.csv", 'a,b\n"x\ny",1\nz\n', "line 4: expected 2 cells, as line 1 has; got 1"),
        ("r.csv", 'a,b\nx,1\n"z,2\n\nw,3\n', "line 3: broken CSV (unexpected end of data)"),
        ("r.csv", "a,b,a\n1,2,3\n", "line 1: two columns are called 'a'; rename one"),
        ("r.csv", "a,b\nx,1\né,2\n".encode("cp1252"), "line 3: not UTF-8 (byte 0xe9)"),
        ("r.jsonl.gz", gzip.compress(GOOD.encode() * 50, mtime=0)[:-9], "cannot be read"),
        ("r.jsonl.gz", GOOD, "cannot be read"),
        ("r.parquet", "no parquet", "not a whole parquet file"),
        ("r.txt", "x", "expected a file that ends in .json, .jsonl, .csv, .parquet"),
    ],
)  # fmt: skip
def test_what_is_broken_is_told_with_its_line(write, name, content, message, capfd):
    path = write(name, content)
    told = refused(path)
    assert told.startswith(f"dataset_name: {path}: ")
    assert message in told
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
    if name in ("r.jsonl", "r.json", "r.csv"):
        inside = write(f"folder/train.{name[2:]}", content)
        told = refused(inside.parent)
        assert told.startswith(f"dataset_name: {inside.parent}: train.{name[2:]}: ")
        assert message in told


@pytest.mark.parametrize("name", ["gone.jsonl", "gone/deep/down", "./gone"])
def test_what_is_not_there_is_told(tmp_path, name):
    assert "no such file" in refused(tmp_path / name)


def test_an_archive_that_is_not_unpacked_is_told(write):
    path = write("packed/train.jsonl.zst", b"\x28\xb5\x2f\xfd")
    assert "train.jsonl.zst: a .zst archive is not read here; unpack it" in refused(path.parent)


@pytest.mark.parametrize(("name", "content"), [("data.zip", b"PK"), ("folder.py", b"print('hello')")])
def test_a_folder_that_datasets_cannot_read_is_told_in_one_line(tmp_path, name, content):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"^dataset_name: \S+/folder: cannot be read as a data set \(.*\)$") as error:
        load_splits(str(folder), None, "dataset_name")
    assert "\n" not in str(error.value)


def test_an_empty_folder_is_told(tmp_path):
    assert "doesn't contain any data files" in refused(tmp_path)


def test_an_empty_file_is_named(write):
    for name, text in (("empty.jsonl", ""), ("header.csv", "prompt,completion\n"), ("empty.csv", ""), ("e.json", "[]")):
        with pytest.raises(ValueError, match=f"dataset_name: .*{name} is empty"):
            load_splits(str(write(name, text)), None, "dataset_name").rows("train", "dataset_split", "train")


# ---------------------------------------------------------------------- the hash


def test_the_hash_is_of_content_and_order_and_the_same_in_every_process(tmp_path):
    rows = [{"a": "x", "b": [1, {"c": None}]}, {"a": "é", "when": datetime.date(2024, 1, 31)}]
    program = f"import datetime; from renyi_engine.data import content_hash\nprint(content_hash({rows!r}))"
    done = []
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", program]
        done.append(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)
    assert done == [content_hash(rows) + "\n"] * 2
    assert content_hash([dict(reversed(rows[0].items())), rows[1]]) == content_hash(rows)
    others = [rows[::-1], rows[:1], [*rows, {}], [rows[0] | {"a": "y"}, rows[1]], [rows[0] | {"d": None}, rows[1]]]
    assert len({content_hash(one) for one in [rows, *others]}) == 6
