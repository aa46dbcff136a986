"""MMLU among the experiments of examples/evidence: its data, and how specialists are told from chance."""

from __future__ import annotations

import gzip
import json
import math

import numpy as np
import pytest
import torch

from examples.evidence.experiment import Answers
from examples.evidence.mmlu import experiment as mmlu
from renyi_engine.evaluation import prompt


def answers_of(right, subjects, base=None, weights=None):
    """Answers A to D of K particles, of which `right` [K, N] is the probability of the right one, A."""
    right = np.asarray(right)
    p = np.stack([right, *[(1 - right) / 3] * 3], axis=-1)
    facts = {"subject": np.asarray(subjects), "right": np.zeros(right.shape[1], dtype=np.int64)}
    more = {} if base is None else {"base": np.asarray(base)}
    weights = [1 / len(right)] * len(right) if weights is None else weights
    return Answers(torch.from_numpy(np.log(p)), torch.tensor(weights, dtype=torch.float64), facts, more)


SUBJECTS = np.repeat(["algebra", "botany", "chess", "dance"], 30)


def specialists(strength):
    """Four particles, each of which knows one of the subjects better."""
    rng = np.random.default_rng(0)
    knows = np.eye(4)[np.unique(SUBJECTS, return_inverse=True)[1]].T
    return 1 / (1 + np.exp(-(strength * knows + rng.normal(size=knows.shape))))


def test_particles_that_know_a_subject_are_found():
    information, z, p = mmlu.specialisation(answers_of(specialists(2.0), SUBJECTS))
    assert information > 0
    assert z > 5
    assert p < 0.01
    assert mmlu.specialisation(answers_of(specialists(2.0), SUBJECTS), null="subjects")[2] < 0.01


@pytest.mark.parametrize("weights", [[0.4, 0.3, 0.2, 0.1], [0.56, 0.44, 0.0, 0.0]])
def test_they_are_found_whatever_their_weights_are(weights):
    _, z, p = mmlu.specialisation(answers_of(specialists(2.0), SUBJECTS, weights=weights))
    assert z > 5
    assert p < 0.01
    # particles that are alike are not made specialists by their weights
    alike = np.random.default_rng(3).random((4, 120))
    assert mmlu.specialisation(answers_of(alike, SUBJECTS, weights=weights))[2] > 0.05


@pytest.mark.parametrize("null", ["particles", "subjects"])
def test_p_is_uniform_if_particles_are_alike(null, monkeypatch):
    monkeypatch.setattr(mmlu, "NUM_PERMUTATIONS", 99)
    rng = np.random.default_rng(1)
    found = [mmlu.specialisation(answers_of(rng.random((4, 120)), SUBJECTS), null=null)[2] for _ in range(200)]
    # the standard deviation of the distribution function of 200 uniform numbers is at most 0.035
    for level in (0.1, 0.25, 0.5, 0.75):
        assert np.mean(np.array(found) <= level) == pytest.approx(level, abs=0.11)


def test_a_particle_that_leads_in_every_subject_is_no_specialist():
    right = np.random.default_rng(2).uniform(0.2, 0.4, size=(4, 120))
    right[0] += 0.5
    assert mmlu.specialisation(answers_of(right, SUBJECTS), null="subjects")[2] > 0.05
    assert mmlu.led(answers_of(right, SUBJECTS)) == 1
    assert mmlu.led(answers_of(specialists(2.0), SUBJECTS)) == 1 / 4
    # a particle that has all of the weight is alone
    assert math.isnan(mmlu.specialisation(answers_of(right, SUBJECTS, weights=[0.9999, 0.0001, 0, 0]))[1])
    # a single particle cannot be compared with others
    assert math.isnan(mmlu.specialisation(answers_of(right[:1], SUBJECTS))[1])


def test_information_is_that_of_the_joint_distribution():
    assert mmlu.information(np.eye(3)) == pytest.approx(math.log(3))
    assert mmlu.information(np.outer([1, 2, 3], [4, 5])) == pytest.approx(0.0, abs=1e-12)
    joint = np.array([[0.4, 0.1], [0.2, 0.3]])
    expected = sum(
        q * math.log(q / (a * b)) for q, a, b in [(0.4, 0.5, 0.6), (0.1, 0.5, 0.4), (0.2, 0.5, 0.6), (0.3, 0.5, 0.4)]
    )
    assert mmlu.information(joint) == pytest.approx(expected)


def test_only_what_the_base_gets_wrong_is_hard():
    base = np.log(np.where(np.arange(120)[:, None] % 3 == 0, [0.7, 0.1, 0.1, 0.1], [0.2, 0.2, 0.5, 0.1]))[None]
    answers = answers_of(specialists(1.0), SUBJECTS, base)
    hard = answers.of(np.arange(120) % 3 != 0)
    assert mmlu.EXPERIMENT.metrics["z_wrong"].of(answers) == mmlu.specialisation(hard)[1]
    assert not np.isnan(mmlu.EXPERIMENT.metrics["p_wrong"].of(answers))


@pytest.fixture
def source(tmp_path):
    def rows(first, last):
        return [
            {
                "subject": ("anatomy", "virology", "sociology")[number % 3],
                "question": f"Question {number}?" + " Long." * 100 * (number % 7 == 6),
                "choices": [f"{number} {letter}" for letter in "abcd"],
                "answer": number % 4,
            }
            for number in range(first, last)
        ]

    parts = {"dev.jsonl": rows(0, 9), "val.jsonl": rows(5, 40), "test.jsonl.gz": rows(30, 90) + rows(80, 85)}
    for name, part in parts.items():
        opener = gzip.open if name.endswith(".gz") else open
        with opener(tmp_path / name, "wt") as file:
            file.write("".join(json.dumps(row) + "\n" for row in part))
    return tmp_path


@pytest.mark.parametrize("form", mmlu.ANSWERS)
def test_no_question_stands_in_two_splits_and_none_is_long(source, form):
    data = mmlu.EXPERIMENT.data({"answer": form, "asked": 5}, 0, source)
    prompts = [row["prompt"] for row in (*data.rows, *data.held_out)] + [question.prompt for question in data.questions]
    assert len(set(prompts)) == len(prompts)
    assert max(map(len, prompts)) <= mmlu.LONGEST
    assert len(data.questions) == 3 * 5
    validation, dev, test = mmlu.read(str(source))
    asked = {prompt(one, []): one for one in test}
    for question, subject, right in zip(data.questions, data.facts["subject"], data.facts["right"], strict=True):
        one = asked[question.prompt]
        assert (one.subject, one.answer) == (subject, right)
    trained = {prompt(one, []): mmlu.ANSWERS[form](one)[one.answer] for one in validation}
    assert {row["prompt"]: row["completion"] for row in data.rows} == trained
    assert len(data.held_out) == len(dev)
    # questions 0 to 4 are in dev alone; of val, those that test asks, too, are left out
    assert {one.text for one in dev} == {f"Question {number}?" for number in range(5)}
    assert {one.text for one in validation} == {f"Question {number}?" for number in range(5, 30) if number % 7 != 6}
