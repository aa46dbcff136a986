"""examples/evidence/out_of_distribution: its data, and its metrics on answers made by hand."""

from __future__ import annotations

import gzip
import json
import math

import numpy as np
import pytest
import torch

from examples.evidence import page
from examples.evidence.experiment import Answers
from examples.evidence.out_of_distribution import experiment as away


@pytest.fixture
def tweets(tmp_path, monkeypatch):
    """Small files of the same form, by the text of each tweet."""
    monkeypatch.setattr(away, "NUM_TRAIN", 8)
    monkeypatch.setattr(away, "NUM_HELD_OUT", 2)
    monkeypatch.setattr(away, "NUM_TESTED", {"in": 4, "near": 3, "far": 3})
    rng, kept = np.random.default_rng(0), {}
    for name, places, annotators in (("md_agreement", away.DOMAINS, 5), ("hs_brexit", (None,), 6)):
        with gzip.open(tmp_path / f"{name}.jsonl.gz", "wt") as file:
            for number in range(90):
                labels = [int(label) for label in rng.integers(2, size=annotators)]
                tweet = {"split": ("train", "dev", "test")[number % 3], "text": f"{name} {number}", "labels": labels}
                if name == "md_agreement":
                    tweet["domain"] = places[number // 3 % 3]
                else:
                    tweet |= {"labels": [1 - label for label in labels], "offensive": [None, *labels[1:]]}
                    if number % 2:
                        tweet["offensive"] = [0, 0, 0, 1, 1, 1]
                kept[tweet["text"]] = tweet
                file.write(json.dumps(tweet) + "\n")
    return tmp_path, kept


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_each_seed_leaves_another_domain_out_and_tests_tweets_that_were_not_trained_on(tweets, seed):
    folder, kept = tweets
    data, left_out = away.EXPERIMENT.data({}, seed, folder), away.DOMAINS[seed]

    def tweet(prompt):
        return kept[prompt.removeprefix("Tweet: ").removesuffix("\nLabels:")]

    for rows, split, each in ((data.rows, "train", 4), (data.held_out, "dev", 1)):
        found = [tweet(row["prompt"]) for row in rows]
        assert [sum(one["domain"] == domain for one in found) for domain in away.DOMAINS] == [
            0 if domain == left_out else each for domain in away.DOMAINS
        ]
        assert {one["split"] for one in found} == {split}
        for row, one in zip(rows, found, strict=True):
            assert row["completion"] == away.ANSWERS[sum(one["labels"]) > 2.5]
    facts = data.facts
    assert facts["place"].tolist() == ["in"] * 4 + ["near"] * 3 + ["far"] * 3
    for number, question in enumerate(data.questions):
        one, place = tweet(question.prompt), facts["place"][number]
        assert facts["domain"][number] == one.get("domain", "Brexit")
        if place == "far":
            said = [label for label in one["offensive"] if label is not None]
            assert len(said) == 5, "a tweet without a majority"
        else:
            said = one["labels"]
            assert one["split"] == "test"
            assert (one["domain"] == left_out) == (place == "near")
        assert facts["offensive"][number] == (2 * sum(said) > len(said))
    asked = {question.prompt for question in data.questions}
    assert len(asked) == 10
    assert not asked & {row["prompt"] for row in [*data.rows, *data.held_out]}


def answers_of(p_yes, weights, place, offensive):
    p = torch.tensor(p_yes, dtype=torch.float64)
    # what is said beside the two answers does not count
    logp = torch.stack([1 - p, p], dim=-1).log() - 1.0
    facts = {"place": np.array(place), "offensive": np.array(offensive)}
    answers = Answers(logp, torch.tensor(weights, dtype=torch.float64), facts)
    return Answers(answers.logp, answers.weights, facts | away.EXPERIMENT.derived(answers))


def entropy(p):
    return -p * math.log(p) - (1 - p) * math.log(1 - p)


def test_metrics_of_answers_made_by_hand():
    # two certain right answers and an uncertain wrong one; elsewhere the two particles contradict each other
    answers = answers_of(
        [[0.99, 0.02, 0.6, 0.9, 0.95], [0.99, 0.02, 0.6, 0.1, 0.05]],
        [0.75, 0.25],
        ["in", "in", "in", "near", "far"],
        [1, 0, 0, 1, 0],
    )
    found = {name: metric.of(answers) for name, metric in away.EXPERIMENT.metrics.items()}
    assert found["accuracy_in"] == pytest.approx(2 / 3)
    assert found["accuracy_out"] == 0.5
    assert found["nll_in"] == pytest.approx(-(math.log(0.99) + math.log(0.98) + math.log(0.4)) / 3)
    assert found["nll_out"] == pytest.approx(-(math.log(0.7) + math.log(1 - 0.725)) / 2)
    # risks when one tweet after the other is answered: 0, 0, 1/3
    assert found["aurc_total_in"] == found["aurc_aleatoric_in"] == pytest.approx(1 / 9)
    assert found["auroc_total_in"] == found["auroc_aleatoric_in"] == 1.0
    assert found["near_epistemic"] == found["far_epistemic"] == 1.0
    assert found["far_total"] == pytest.approx(2 / 3)  # less uncertain than the wrong answer, more than the others
    total, aleatoric = entropy(0.7), entropy(0.9)
    assert answers.facts["total"][3] == pytest.approx(total)
    assert answers.facts["aleatoric"][3] == pytest.approx(aleatoric)
    assert answers.facts["epistemic"][3] == pytest.approx(total - aleatoric)
    risks = away.EXPERIMENT.curves["risks_in"](answers)
    assert len(risks) == len(away.COVERAGES)
    assert (risks[0], risks[-1]) == (0.0, pytest.approx(1 / 3))


def test_one_adapter_knows_no_epistemic_uncertainty():
    answers = answers_of([[0.9, 0.2, 0.7, 0.4]], [1.0], ["in", "in", "near", "far"], [1, 1, 1, 1])
    found = {name: metric.of(answers) for name, metric in away.EXPERIMENT.metrics.items()}
    assert found["auroc_epistemic_in"] == found["near_epistemic"] == found["far_epistemic"] == 0.5
    assert found["aurc_epistemic_in"] == 1 - found["accuracy_in"] == 0.5
    assert math.isnan(away.tells_wrong(answers.of(np.array([0])), "total"))


def test_metrics_with_a_table_of_their_own_are_shown_apart_and_the_first_table_has_the_costs():
    value = {"mean": 0.5, "seeds": [0.4, 0.6], "interval": [0.4, 0.6]}
    method = {
        "label": "one LoRA",
        "metrics": dict.fromkeys(away.EXPERIMENT.metrics, value),
        "costs": {"seconds": 1.0, "tokens": 2000.0, "parameters": 3e6},
    }
    trained = {"num_particles": 4, "max_steps": 80, "batch_size": 2, "dtype": "float32"}
    variant = {"name": "a variant", **trained, "methods": {"lora": method}}
    lines = page._tables(away.EXPERIMENT.metrics, variant, num_seeds=2)
    names = list(dict.fromkeys(metric.table for metric in away.EXPERIMENT.metrics.values()))
    assert [line for line in lines if line.endswith(":")] == [
        f"A variant (K = 4, 80 steps of 2 rows, float32), {name}:" for name in names
    ]
    headers = [line for line in lines if line.startswith("| method")]
    assert ["seconds | tokens | parameters" in header for header in headers] == [True, False, False]
    assert [header.count("|") - 2 for header in headers] == [8 + 3, 8, 6]
