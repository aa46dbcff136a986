"""Refusals among the experiments of examples/evidence: its pairs, and the variance over particles."""

from __future__ import annotations

import csv
import gzip
import json

import numpy as np
import pytest
import torch

from examples.evidence.experiment import Answers, Question
from examples.evidence.methods import choices_of
from examples.evidence.refusal import experiment as refusal
from examples.evidence.refusal.pairs import KINDS, make_pairs
from renyi_engine.data import encode_prompts
from renyi_engine.evaluation import REFUSALS, Exchange, KeywordJudge
from renyi_engine.objectives import SftTask


def refuses(replies):
    return KeywordJudge()([Exchange("", replies[0]["content"])])[0].label in REFUSALS


@pytest.mark.parametrize("seed", range(3))
def test_half_of_the_ambiguous_pairs_prefer_to_refuse_and_none_of_the_others_is_contested(seed):
    pairs = make_pairs(seed, refusal.NUM_PAIRS)
    assert len({row["prompt"][0]["content"] for row in pairs}) == sum(refusal.NUM_PAIRS.values())
    for kind in KINDS:
        chosen = [refuses(row["chosen"]) for row in pairs if row["kind"] == kind]
        rejected = [refuses(row["rejected"]) for row in pairs if row["kind"] == kind]
        assert len(chosen) == refusal.NUM_PAIRS[kind]
        # one reply of each pair refuses, the other helps
        assert all(a != b for a, b in zip(chosen, rejected, strict=True))
        assert np.mean(chosen) == {"ambiguous": 0.5, "harmful": 1.0, "harmless": 0.0}[kind]
    assert make_pairs(seed, refusal.NUM_PAIRS) == pairs
    assert make_pairs(seed + 1, refusal.NUM_PAIRS) != pairs


@pytest.fixture
def source(tmp_path):
    (tmp_path / "hh_rlhf_harmless").mkdir()
    (tmp_path / "xstest").mkdir()
    start = "\n\nHuman: Is it late?\n\nAssistant:"
    rows = [{"chosen": f"{start} No, {n}.", "rejected": f"{start} Yes, {n}."} for n in range(330)]
    rows += [
        {
            "chosen": f"{start} No.\n\nHuman: And now?\n\nAssistant: No.",
            "rejected": f"{start} No.\n\nHuman: And now?\n\nAssistant: Yes.",
        },
        {"chosen": f"{start} No." + " Really." * 60, "rejected": f"{start} Yes."},
        {"chosen": f"{start} No.", "rejected": f"{start}"},
    ]
    with gzip.open(tmp_path / "hh_rlhf_harmless" / "test.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    with (tmp_path / "xstest" / "xstest_prompts.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "prompt", "type", "label", "focus", "note"])
        writer.writerows([n, f"Prompt {n}?", "homonyms", ("safe", "unsafe")[n % 2], "", ""] for n in range(150))
    return tmp_path


def test_pairs_of_people_are_short_and_of_one_request(source):
    data = refusal.EXPERIMENT.data({"pairs": "people"}, 0, source)
    assert len(data.rows) == 300
    assert len(data.held_out) == 20
    assert data.rows[0]["prompt"] == [{"role": "user", "content": "Is it late?"}]
    said = [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in (*data.rows, *data.held_out)]
    assert len(set(said)) == 320
    assert all(chosen.replace("No", "Yes") == rejected for chosen, rejected in said)
    assert [(data.facts["split"] == split).sum() for split in ("safe", "unsafe")] == [40, 40]
    for question, split in zip(data.questions, data.facts["split"], strict=True):
        assert int(question.prompt.split()[1][:-1]) % 2 == (split == "unsafe")


def answers_of(refusing, split, more=None):
    """Answers of K particles, each of which refuses with probability `refusing` [K, N]."""
    p = np.asarray(refusing)[..., None]
    num_refusing, num_complying = len(refusal.REFUSING), len(refusal.COMPLYING)
    parts = [p / num_refusing] * num_refusing + [(1 - p) / num_complying] * num_complying
    logp = torch.from_numpy(np.log(np.concatenate(parts, axis=-1))) - 5.0
    weights = torch.full((len(p),), 1 / len(p), dtype=torch.float64)
    return Answers(logp, weights, {"split": np.asarray(split)}, more or {})


def test_variance_over_particles_is_that_of_their_means():
    split = ["safe"] * 4 + ["unsafe"] * 4
    # on safe prompts one particle refuses more; on unsafe ones each refuses others, but as many
    p = np.array([[0.8] * 4 + [0.9, 0.1, 0.9, 0.1], [0.2] * 4 + [0.1, 0.9, 0.1, 0.9]])
    answers, metrics = answers_of(p, split), refusal.EXPERIMENT.metrics
    assert metrics["refusing_safe"].of(answers) == pytest.approx(0.5)
    assert metrics["variance_safe"].of(answers) == pytest.approx(1000 * 0.18)
    assert metrics["within_safe"].of(answers) == pytest.approx(1000 * 0.18)
    assert metrics["variance_unsafe"].of(answers) == pytest.approx(0.0, abs=1e-9)
    assert metrics["within_unsafe"].of(answers) == pytest.approx(1000 * 0.32)
    assert np.isnan(metrics["variance_safe"].of(answers_of(p[:1], split)))


def test_disagreement_is_free_of_the_noise_of_the_draws():
    rng, N = np.random.default_rng(0), 4000
    rates = np.array([0.2, 0.5, 0.5, 0.8])
    refused = rng.binomial(2, rates[:, None], size=(4, N))
    more = {"refused": refused, "judged": np.full((4, N), 2)}
    answers, metrics = answers_of(np.full((4, N), 0.5), ["safe"] * N, more), refusal.EXPERIMENT.metrics
    assert metrics["disagreement_safe"].of(answers) == pytest.approx(1000 * rates.var(ddof=1), abs=6)
    assert metrics["refused_safe"].of(answers) == pytest.approx(0.5, abs=0.02)


def test_particles_that_refuse_alike_have_no_variance_on_average_over_the_draws():
    rng, rates = np.random.default_rng(0), np.linspace(0.1, 0.9, 40)
    found = []
    for _ in range(400):
        more = {"refused": rng.binomial(2, rates, size=(4, 40)), "judged": np.full((4, 40), 2)}
        found.append(refusal.variance_of_sampled(answers_of(np.full((4, 40), 0.5), ["safe"] * 40, more)))
    assert np.mean(found) == pytest.approx(0.0, abs=4 * np.std(found) / 20)
    noise = 1000 * (rates * (1 - rates) / 2).mean() / 40
    assert noise > 8 * np.std(found) / 20  # which would be seen


def test_an_opening_follows_the_turn_of_the_user_and_has_no_end(tokenizer):
    question = Question("Is it late?", ("I can't", "Sure"), openings=True)
    choices = choices_of(SftTask(tokenizer, 64), question)
    assert choices.prompt == encode_prompts(tokenizer, ["Is it late?"])[0]
    assert [tokenizer.decode(ids) for ids in choices.completions] == ["I can't", "Sure"]
