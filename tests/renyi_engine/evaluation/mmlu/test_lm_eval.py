"""Results and samples have lm-eval's shape, numbers and hashes; literal ones are what lm-eval 0.4.13 gives."""

from __future__ import annotations

import pytest
from jinja2 import Template

from renyi_engine.evaluation.config import MmluConfig
from renyi_engine.evaluation.mmlu.lm_eval import results, sample, task_hashes
from renyi_engine.evaluation.mmlu.questions import Question, prompt

# by subject: two of stem, one of other
RIGHT = {"anatomy": [1, 0, 0, 1, 0], "virology": [0, 0, 1, 0, 0, 0, 1], "astronomy": [1, 1, 0]}
SIZES = {"anatomy": 135, "virology": 7, "astronomy": 150}
QUESTIONS = [
    Question(number, subject, f"{subject} {number}?", ("a", "b", "c", "d"), 1)
    for subject, right in RIGHT.items()
    for number in range(len(right))
]


def made(questions=QUESTIONS, right=RIGHT, sizes=SIZES) -> dict:
    flat = [bool(one) for subject in right.values() for one in subject]
    return results(questions, flat, sizes, MmluConfig("model", output_dir="out", num_fewshot=2))


def test_accuracies_and_errors_are_lm_evals():
    scores = {
        name: (row["acc,none"], row["acc_stderr,none"], row["sample_len"]) for name, row in made()["results"].items()
    }
    assert scores == {
        "mmlu_anatomy": pytest.approx((2 / 5, 0.24494897427831783, 5), rel=1e-12),
        "mmlu_virology": pytest.approx((2 / 7, 0.18442777839082936, 7), rel=1e-12),
        "mmlu_astronomy": pytest.approx((2 / 3, 0.33333333333333337, 3), rel=1e-12),
        "mmlu_stem": pytest.approx((4 / 8, 0.19720265943665388, 8), rel=1e-12),
        "mmlu_other": pytest.approx((2 / 7, 0.18442777839082936, 7), rel=1e-12),
        "mmlu": pytest.approx((6 / 15, 0.1353029131500069, 15), rel=1e-12),
    }


def test_one_question_has_no_error_and_leaves_its_groups_without_one():
    scores = made(QUESTIONS[:6], {"anatomy": RIGHT["anatomy"], "virology": [1]})["results"]
    assert [scores[name]["acc_stderr,none"] for name in ("mmlu_virology", "mmlu_other", "mmlu")] == ["N/A"] * 3
    assert scores["mmlu_stem"]["acc_stderr,none"] == pytest.approx(0.24494897427831783)


def test_keys_are_lm_evals():
    found = made()
    assert list(found) == [
        "results", "groups", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better", "n-samples"
    ]  # fmt: skip
    assert found["group_subtasks"] == {
        "mmlu": ["mmlu_stem", "mmlu_other"],
        "mmlu_stem": ["mmlu_anatomy", "mmlu_astronomy"],
        "mmlu_other": ["mmlu_virology"],
    }
    assert found["results"]["mmlu_stem"].keys() == {
        "name", "alias", "sample_len", "acc,none", "acc_stderr,none", "sample_count"
    }  # fmt: skip
    social = made([Question(0, "sociology", "?", ("a", "b", "c", "d"), 1)], {"sociology": [1]}, {"sociology": 1})
    aliases = {name: row["alias"] for name, row in social["results"].items()}
    assert aliases == {"mmlu_sociology": "sociology", "mmlu_social_sciences": "social sciences", "mmlu": "mmlu"}
    assert found["groups"] == {name: found["results"][name] for name in ("mmlu_stem", "mmlu_other", "mmlu")}
    assert found["n-samples"]["mmlu_anatomy"] == {"original": 135, "effective": 5}
    assert found["n-shot"] == {"mmlu_anatomy": 2, "mmlu_virology": 2, "mmlu_astronomy": 2}
    tasks, groups = list(found["n-shot"]), ["mmlu_stem", "mmlu_other", "mmlu"]
    assert found["versions"] == {**dict.fromkeys(tasks, 1.0), **dict.fromkeys(groups, "2")}


def test_the_template_in_the_configuration_makes_the_prompt():
    question = Question(0, "anatomy", " Why?\n", ("w", "x ", "y", "z"), 3)
    config = made()["configs"]["mmlu_anatomy"]
    rendered = Template(config["doc_to_text"], keep_trailing_newline=True).render(question.record())
    assert config["description"] + rendered == prompt(question, ())


def test_a_sample_has_lm_evals_fields_and_hashes():
    one = sample(Question(3, "anatomy", "Is 1 < 2? é", ("a", "b", "c", "d"), 2), "Answer:", [-3.5, -2.0, -1.5, -9.0])
    assert one == {
        "doc_id": 3,
        "doc": {"question": "Is 1 < 2? é", "subject": "anatomy", "choices": ["a", "b", "c", "d"], "answer": 2},
        "target": "2",
        "arguments": {f"gen_args_{i}": {"arg_0": "Answer:", "arg_1": f" {letter}"} for i, letter in enumerate("ABCD")},
        "resps": [[["-3.5", None]], [["-2.0", None]], [["-1.5", None]], [["-9.0", None]]],
        "filtered_resps": [["-3.5", None], ["-2.0", None], ["-1.5", None], ["-9.0", None]],
        "filter": "none",
        "metrics": ["acc"],
        "doc_hash": "de74b2e86b97dbee54e3f23ac1abcfe164a8952d3c80b12f5254452176369630",
        "prompt_hash": "64f89cf423ee1a167e9c8142a340d7aaef3605a56c73d30275fbdd94d098e36c",
        "target_hash": "d4735e3a265e16eee03f59718b9b5d03019c07d8b6c51f90da3a666eec13ab35",
        "acc": 1.0,
    }
    assert sample(Question(3, "anatomy", "?", ("a", "b", "c", "d"), 0), "?", [-3.5, -2.0, -1.5, -9.0])["acc"] == 0.0


def test_a_task_is_hashed_by_what_was_asked_and_not_by_the_answers_given():
    asked = [sample(question, "?", [-1.0, -2.0, -3.0, -4.0]) for question in QUESTIONS]
    again = [sample(question, "?", [-4.0, -3.0, -2.0, -1.0]) for question in QUESTIONS]
    assert task_hashes(asked) == task_hashes(again)
    fewer = task_hashes(asked[:-1])
    assert {name for name, value in task_hashes(asked).items() if fewer[name] != value} == {"mmlu_astronomy"}
