"""Prompts: which rows, under which split, and which are refused."""

from __future__ import annotations

import datasets
import pytest

from renyi_engine.evaluation.refusal.prompts import Prompt, PromptColumns, read_prompts


@pytest.fixture
def rows(tmp_path, jsonl):
    """rows(name, ...) writes name.jsonl; returns its path."""
    return lambda name, *rows: str(jsonl(tmp_path / f"{name}.jsonl", list(rows)))


MIXED = [
    {"prompt": "a", "kind": "safe", "n": 0, "category": "x"},
    {"prompt": "b", "kind": "unsafe", "n": 1, "category": None},
    {"prompt": "c", "kind": "safe", "n": 1, "category": "y"},
    {"prompt": "d", "kind": "safe", "n": 0, "category": "y"},
]


def test_a_file_is_one_split_that_goes_by_its_name(rows):
    assert read_prompts([rows("xstest", *MIXED)]) == [
        Prompt(i, "xstest", row["prompt"], row["category"], None) for i, row in enumerate(MIXED)
    ]


def test_files_columns_and_limits_make_splits_one_after_the_other(rows):
    names = [rows("one", *MIXED), rows("two", *MIXED[:2])]
    columns = PromptColumns(split="kind", label="n")
    found = read_prompts(names, columns=columns, limit=2)
    assert [(p.split, p.prompt, p.label) for p in found] == [
        ("one/safe", "a", "0"),
        ("one/safe", "c", "1"),
        ("one/unsafe", "b", "1"),
        ("two/safe", "a", "0"),
        ("two/unsafe", "b", "1"),
    ]
    assert [p.prompt_id for p in found] == list(range(5))
    assert [p.split for p in read_prompts(names[:1], columns=PromptColumns(split="kind"))] == ["safe"] * 3 + ["unsafe"]


def test_splits_and_configurations_of_a_data_set_are_splits(tmp_path, monkeypatch):
    made = datasets.DatasetDict({name: datasets.Dataset.from_list([{"prompt": name}]) for name in ("train", "test")})
    made.save_to_disk(tmp_path / "both")
    assert [p.split for p in read_prompts([str(tmp_path / "both")])] == ["train", "test"]
    asked = []

    def load(name, config):
        asked.append((name, config))
        return {"train": datasets.Dataset.from_list([{"prompt": f"{config} prompt", "category": "c"}])}

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = read_prompts(["bench-llm/or-bench"], ["or-bench-hard-1k", "or-bench-toxic"])
    assert asked == [("bench-llm/or-bench", "or-bench-hard-1k"), ("bench-llm/or-bench", "or-bench-toxic")]
    assert [(p.split, p.prompt) for p in found] == [
        ("or-bench-hard-1k", "or-bench-hard-1k prompt"),
        ("or-bench-toxic", "or-bench-toxic prompt"),
    ]
    assert [p.split for p in read_prompts(["bench-llm/or-bench"])] == ["or-bench"]


def test_bad_data_is_told_in_one_line_with_its_row(rows, tmp_path):
    def refused(match, names, columns=None):
        with pytest.raises(ValueError, match=match) as error:
            read_prompts(names, columns=columns)
        assert "\n" not in str(error.value)

    refused(r"blank\.jsonl: row 1: prompt is empty", [rows("blank", {"prompt": "a"}, {"prompt": " \n"})])
    refused(r"null\.jsonl: row 1: prompt is empty", [rows("null", {"prompt": "a"}, {"prompt": None})])
    refused(r"row 1: kind is empty", [rows("k", MIXED[0], MIXED[1] | {"kind": None})], PromptColumns(split="kind"))
    refused(r"expected the columns prompt; got \['promt'\]; is 'promt' meant", [rows("typo", {"promt": "a"})])
    refused("expected the columns prompt \\+ lable; got", [rows("l", *MIXED)], PromptColumns(label="lable"))
    refused(
        r"chat\.jsonl: row 0: prompt: expected a text; got list .*role", [rows("chat", {"prompt": [{"role": "user"}]})]
    )
    refused("no such file", [str(tmp_path / "none.csv")])
    (tmp_path / "empty.csv").write_text("")
    refused("empty.csv", [str(tmp_path / "empty.csv")])
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "l.csv").write_text("prompt\na\n")
    refused("2 data sets are called 'l'", [rows("l", *MIXED), str(tmp_path / "sub" / "l.csv")])


def test_prompts_and_labels_are_the_texts_of_their_file_whatever_it_is_called(tmp_path, rows):
    (tmp_path / "mine[1].csv").write_text("prompt,category,n\n007,,1\n2024-01-31,x,0\n")
    (tmp_path / "mine1.csv").write_text("prompt,category,n\nwrong,,1\nwrong,,0\n")
    assert read_prompts([str(tmp_path / "mine[1].csv")], columns=PromptColumns(label="n")) == [
        Prompt(0, "mine[1]", "007", None, "1"),
        Prompt(1, "mine[1]", "2024-01-31", "x", "0"),
    ]
