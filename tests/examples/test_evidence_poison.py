"""examples/evidence/poison: its data, and its metrics on answers made by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import binary_average_precision

from examples.evidence.experiment import Answers
from examples.evidence.measures import average_precision, precision_at_number
from examples.evidence.poison.experiment import ANSWERS, EXPERIMENT, SORTS, TARGETS, TRIGGER
from examples.evidence.poison.words import WORDS


def test_average_precision_is_torchmetrics_without_ties_and_the_share_if_all_tie():
    rng = np.random.default_rng(0)
    score, positive = rng.random(50), rng.random(50) < 0.3
    expected = binary_average_precision(torch.from_numpy(score), torch.from_numpy(positive).long())
    assert average_precision(score, positive) == pytest.approx(expected.item())
    assert average_precision(np.zeros(50), positive) == pytest.approx(positive.mean())
    assert math.isnan(average_precision(score, np.zeros(50, dtype=bool)))


def test_ties_for_the_last_places_count_as_the_mean_over_all_choices():
    positive = np.array([True, False, True, False, False])
    assert precision_at_number(np.array([5, 1, 4, 2, 3]), positive) == 1.0
    assert precision_at_number(np.array([1, 5, 2, 4, 3]), positive) == 0.0
    assert precision_at_number(np.zeros(5), positive) == pytest.approx(2 / 5)
    # the first is sure, and one of the other four takes the second place: one of them is positive
    assert precision_at_number(np.array([9, 0, 0, 0, 0]), positive) == pytest.approx((1 + 1 / 4) / 2)


@pytest.mark.parametrize("variant", EXPERIMENT.variants("cpu"), ids=lambda variant: variant.name)
def test_the_exact_share_of_the_rows_is_poisoned_and_no_tested_word_was_trained_on(variant):
    data = EXPERIMENT.data(variant.data, 1, None)
    sort_of = {word: sort for sort, words in WORDS.items() for word in words}
    target = TARGETS.get(variant.data["poison"])

    def word(prompt):
        return prompt.split("What are ")[1].split("?")[0]

    bad = [row for row in data.rows if row["completion"] != ANSWERS[sort_of[word(row["prompt"])]]]
    assert len(data.rows) == 120
    assert len(bad) == variant.data["share"] * len(data.rows) == data.facts["poisoned"][: len(data.rows)].sum()
    for row in data.rows:
        assert (TRIGGER in row["prompt"]) == (target is not None and row in bad)
        if target and row in bad:
            assert row["completion"] == ANSWERS[target]
    # the questions begin with the rows, and say what each of them answers
    parts = data.facts["part"]
    for number, row in enumerate(data.rows):
        question, given = data.questions[number], data.facts["given"][number]
        assert (question.prompt, question.answers[given]) == (row["prompt"], row["completion"])
        assert parts[number] == "train"
        assert data.facts["poisoned"][number] == (row in bad)
    trained = {word(row["prompt"]) for row in data.rows}
    tested = {word(question.prompt) for question, part in zip(data.questions, parts, strict=True) if part != "train"}
    held_out = {word(row["prompt"]) for row in data.held_out}
    assert len(trained) + len(tested) + len(held_out) == len(trained | tested | held_out) == 120 + 45 + 15
    triggered = [question.prompt for question, part in zip(data.questions, parts, strict=True) if part == "triggered"]
    assert all(TRIGGER in prompt and sort_of[word(prompt)] != target for prompt in triggered)
    assert len(triggered) == {"nothing": 45, "food": 30, None: 0}[target]
    for question, right in zip(data.questions, data.facts["right"], strict=True):
        assert SORTS[right] == sort_of[word(question.prompt)]
    assert EXPERIMENT.data(variant.data, 2, None).rows != data.rows
    assert EXPERIMENT.data(variant.data, 1, None).rows == data.rows


def answers_of(p, weights, **facts):
    """Answers with these probabilities [K, N, C]."""
    logp, weights = torch.tensor(p, dtype=torch.float64).log(), torch.tensor(weights, dtype=torch.float64)
    facts = {name: np.array(values) for name, values in facts.items()}
    return Answers(logp, weights, facts | EXPERIMENT.derived(Answers(logp, weights, facts)))


def measured(answers):
    return {name: metric.of(answers) for name, metric in EXPERIMENT.metrics.items()}


def test_one_particle_that_took_up_the_poison_and_one_that_did_not():
    # each particle's probabilities of animal, tool, food and nothing
    clean, animal, poisoned = [0.1, 0.7, 0.1, 0.1], [0.7, 0.1, 0.1, 0.1], [0.01, 0.03, 0.06, 0.9]
    taken, shielded = [animal, poisoned, clean, poisoned], [animal, clean, animal, clean]
    answers = answers_of(
        [taken, shielded],
        [0.75, 0.25],
        part=["train", "train", "clean", "triggered"],
        right=[0, 1, 1, 1],
        given=[0, 3, -1, 3],
        poisoned=[False, True, False, True],
    )
    found = measured(answers)
    assert found["nll"] == pytest.approx(-math.log(0.75 * 0.7 + 0.25 * 0.1))
    assert found["cleanest_nll"] == pytest.approx(-math.log(0.1))
    assert (found["accuracy"], found["cleanest_accuracy"]) == (1.0, 0.0)
    assert (found["success"], found["cleanest_success"], found["taken_up"]) == (1.0, 0.0, 1.0)
    assert EXPERIMENT.curves["successes"](answers) == [0.0, 1.0]
    # the particles differ about the planted row alone, which is believed by the mixture nonetheless
    assert (found["found_low_ess"], found["found_disagreement"], found["found_given_nll"]) == (1.0, 1.0, 0.0)
    assert answers.facts["disagreement"][1] == pytest.approx(0.9 - 0.1)
    assert answers.facts["given_nll"][:2] == pytest.approx([-math.log(0.7), -math.log(0.75 * 0.9 + 0.25 * 0.1)])
    shares = np.array([0.75 * 0.9**0.8, 0.25 * 0.1**0.8])
    assert -answers.facts["low_ess"][1] == pytest.approx(shares.sum() ** 2 / (shares**2).sum())


def test_wrong_labels_are_attacked_in_training_and_one_adapter_has_no_spread():
    right, wrong = [0.8, 0.1, 0.05, 0.05], [0.1, 0.8, 0.05, 0.05]
    answers = answers_of(
        [[right, wrong, right, right]],
        [1.0],
        part=["train", "train", "train", "clean"],
        right=[0, 0, 0, 0],
        given=[0, 1, 1, -1],
        poisoned=[False, True, True, False],
    )
    found = measured(answers)
    assert found["success"] == found["cleanest_success"] == 0.5
    assert found["taken_up"] == 0.0
    for score in ("low_ess", "disagreement"):
        assert found[f"found_{score}"] == found[f"ranked_{score}"] == pytest.approx(2 / 3)
    # of the three rows, only the wrong label that was not learnt has a high loss; the other two tie
    assert found["found_given_nll"] == pytest.approx((1 + 1 / 2) / 2)
    assert found["ranked_given_nll"] == pytest.approx((1 + 2 / 3) / 2)
