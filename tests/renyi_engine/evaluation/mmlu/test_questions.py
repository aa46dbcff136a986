"""Questions are read alike from every form, asked word for word as lm-eval asks them, and refused by row if broken."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import pytest
import yaml
from datasets import Dataset, DatasetDict

from renyi_engine.evaluation.mmlu.questions import GROUPS, SUBJECTS, Question, check_subjects, load_questions, prompt

ROWS = [
    {"subject": "anatomy", "question": " Which?\nOne. ", "choices": ["a ", "b", "", "d"], "answer": 2},
    {"subject": "virology", "question": "Is 1 < 2, or \"not\"?", "choices": ["yes", "no", "both", "é"], "answer": 0},
    {"subject": "anatomy", "question": "Last?", "choices": ["1", "2", "3", "4"], "answer": 3},
]  # fmt: skip


def as_jsonl(folder: Path) -> None:
    text = "".join(json.dumps(row) + "\n" for row in ROWS)
    (folder / "val.jsonl").write_text(text, encoding="utf-8")
    (folder / "test.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (folder / "dev.jsonl").write_text(text, encoding="utf-8")


def as_parquet_with_letters(folder: Path) -> None:
    rows = [row | {"answer": "ABCD"[row["answer"]]} for row in ROWS]
    for name in ("validation", "test", "dev"):
        Dataset.from_list(rows).to_parquet(str(folder / f"{name}.parquet"))


def as_published(folder: Path) -> None:
    for name in ("val", "test", "dev"):
        (folder / name).mkdir()
        for subject in ("anatomy", "virology"):
            with (folder / name / f"{subject}_{name}.csv").open("w", encoding="utf-8", newline="") as file:
                for row in ROWS:
                    if row["subject"] == subject:
                        csv.writer(file).writerow([row["question"], *row["choices"], "ABCD"[row["answer"]]])


def as_the_hub_has_it(folder: Path) -> None:
    files = []
    for name in ("validation", "test", "dev"):
        (folder / "all").mkdir(exist_ok=True)
        Dataset.from_list(ROWS).to_parquet(str(folder / "all" / f"{name}-00000-of-00001.parquet"))
        files.append({"split": name, "path": f"all/{name}-*"})
    configs = {"configs": [{"config_name": "all", "data_files": files}]}
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(configs)}---\n", encoding="utf-8")


def as_saved(folder: Path) -> None:
    DatasetDict({name: Dataset.from_list(ROWS) for name in ("validation", "test", "dev")}).save_to_disk(folder)


@pytest.mark.parametrize("split", ["validation", "test", "dev"])
@pytest.mark.parametrize("write", [as_jsonl, as_parquet_with_letters, as_published, as_the_hub_has_it, as_saved])
@pytest.mark.parametrize("name", ["mmlu", "mmlu[1]"])
def test_every_form_holds_the_same_questions(tmp_path, write, split, name):
    (tmp_path / name).mkdir()
    write(tmp_path / name)
    assert load_questions(str(tmp_path / name), split) == {
        "anatomy": [
            Question(0, "anatomy", " Which?\nOne. ", ("a ", "b", "", "d"), 2),
            Question(1, "anatomy", "Last?", ("1", "2", "3", "4"), 3),
        ],
        "virology": [Question(0, "virology", 'Is 1 < 2, or "not"?', ("yes", "no", "both", "é"), 0)],
    }


def test_a_question_is_asked_word_for_word_as_lm_eval_asks_it():
    question = Question(0, "high_school_physics", "  Why?\n", ("a ", "b", "c", "d"), 0)
    examples = [Question(0, "high_school_physics", "One? ", ("1", "2", "3", "4"), 3), question]
    description = "The following are multiple choice questions (with answers) about high school physics.\n\n"
    asked = "Why?\nA. a \nB. b\nC. c\nD. d\nAnswer:"
    assert prompt(question, ()) == description + asked
    assert prompt(question, examples) == (
        f"{description}One?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: D\n\n{asked} A\n\n{asked}"
    )


def test_there_are_57_subjects_in_four_groups():
    assert {group: len(subjects) for group, subjects in GROUPS.items()} == {
        "stem": 19, "other": 13, "social_sciences": 12, "humanities": 13
    }  # fmt: skip
    assert len(set(SUBJECTS)) == 57


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"choices": ["a", "b", "c"]}, r"choices: expected a list of 4 texts; got \['a', 'b', 'c'\]"),
        ({"choices": ["a", "b", "c", None]}, "choices: expected a list of 4 texts"),
        ({"answer": 4}, "answer: expected 0 to 3, or A to D; got 4"),
        ({"answer": -1}, "answer: expected 0 to 3"),
        ({"answer": None}, "answer: expected 0 to 3, or A to D; got None"),
        ({"question": " \n"}, r"question: expected a text; got ' \\n'"),
        ({"subject": "anatomie"}, "subject: 'anatomie' is none of MMLU's 57 subjects; did you mean 'anatomy'"),
    ],
)
def test_a_broken_row_is_named_in_one_line(tmp_path, jsonl, change, message):
    jsonl(tmp_path / "test.jsonl", [ROWS[0], ROWS[1] | change])
    with pytest.raises(ValueError, match=f"^dataset_name: test row 1: {message}") as caught:
        load_questions(str(tmp_path), "test")
    assert "\n" not in str(caught.value)


def test_an_unknown_letter_is_refused(tmp_path, jsonl):
    jsonl(tmp_path / "test.jsonl", [ROWS[0] | {"answer": "E"}])
    with pytest.raises(ValueError, match="test row 0: answer: expected 0 to 3, or A to D; got 'E'"):
        load_questions(str(tmp_path), "test")


def test_a_missing_column_is_named_with_the_one_that_may_be_meant(tmp_path, jsonl):
    jsonl(tmp_path / "test.jsonl", [{("option" if k == "choices" else k): v for k, v in ROWS[0].items()}])
    with pytest.raises(ValueError, match=r"expected the columns subject \+ question \+ choices \+ answer; got"):
        load_questions(str(tmp_path), "test")


def test_a_published_file_with_too_few_cells_is_named(tmp_path):
    as_published(tmp_path)
    with (tmp_path / "test" / "anatomy_test.csv").open("a", encoding="utf-8") as file:
        file.write("Why?,a,b,c,A\n")
    with pytest.raises(ValueError, match=r"anatomy_test.csv: line 4: expected 6 cells: .* got 5"):
        load_questions(str(tmp_path), "test")


def test_a_split_or_a_data_set_that_is_not_there_is_refused(tmp_path):
    as_jsonl(tmp_path)
    (tmp_path / "val.jsonl").unlink()
    with pytest.raises(
        ValueError, match=r"dataset_name: .* has no validation split; expected val.jsonl, val/SUBJECT_val"
    ):
        load_questions(str(tmp_path), "validation")
    with pytest.raises(ValueError, match=r"dataset_name: .*nowhere: no such file or folder"):
        load_questions(str(tmp_path / "nowhere"), "test")


def test_one_file_is_no_data_set_of_splits(tmp_path, jsonl):
    # its rows would be the solved examples of themselves
    path = jsonl(tmp_path / "test.jsonl", ROWS)
    with pytest.raises(ValueError, match=r"dataset_name: .*test.jsonl is one file; expected a hub id, or a folder"):
        load_questions(str(path), "test")


def test_an_unknown_subject_is_refused_with_the_nearest_one():
    check_subjects(["anatomy", "virology"])
    with pytest.raises(ValueError, match=r"subjects: 'World Religions' is none of .* did you mean 'world_religions'"):
        check_subjects(["anatomy", "World Religions"])
