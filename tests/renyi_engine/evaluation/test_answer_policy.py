"""Decisions follow from the uncertainty, and calibration keeps its promise.

Layout: K particles, N questions, C choices.
"""

from __future__ import annotations

import math

import mpmath
import pytest
import torch

from renyi_engine.evaluation.answer_policy import NUM_CANDIDATES, Policy, calibrate, decide, risk_bound
from renyi_engine.evaluation.uncertainty import Predictive, predictive

from .test_uncertainty import of_probabilities


def test_decide_answers_what_is_sure_clarifies_what_is_contested_and_abstains_from_the_rest():
    result = of_probabilities(
        [
            [[0.99, 0.01], [0.99, 0.01], [0.5, 0.5], [0.9, 0.1]],
            [[0.98, 0.02], [0.01, 0.99], [0.5, 0.5], [0.4, 0.6]],
        ]
    )
    shares = (result.epistemic / result.total).tolist()
    assert shares[1] > 0.9
    assert 0.2 < shares[3] < 0.25
    assert decide(result, Policy(answer_below=0.1)) == ["answer", "clarify", "abstain", "abstain"]
    assert decide(result, Policy(answer_below=0.1, clarify_share=0.2)) == ["answer", "clarify", "abstain", "clarify"]
    assert decide(result, Policy(answer_below=math.log(2))) == ["answer"] * 4
    assert decide(result, Policy(answer_below=0.0, clarify_share=1.0)) == ["abstain"] * 4
    assert decide(result, Policy(answer_below=result.total[0].item()))[0] == "answer"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((-0.1,), "answer_below"),
        ((math.nan,), "answer_below"),
        ((0.5, 1.5), "clarify_share"),
        ((0.5, -1), "clarify_share"),
    ],
)
def test_a_policy_out_of_range_is_refused(arguments, named):
    with pytest.raises(ValueError, match=named):
        Policy(*arguments)


@pytest.mark.parametrize(("num_wrong", "num_answered"), [(0, 1), (0, 300), (1, 2), (7, 40), (39, 40), (211, 1003)])
@pytest.mark.parametrize("confidence", [0.2, 0.95, 0.9975])
def test_risk_bound_is_where_the_binomial_tail_meets_the_confidence(num_wrong, num_answered, confidence):
    bound = risk_bound(num_wrong, num_answered, confidence)
    # P(Binomial(n, p) <= e) as the regularised incomplete beta function I_{1-p}(n - e, e + 1)
    tail = mpmath.betainc(num_answered - num_wrong, num_wrong + 1, 0, 1 - bound, regularized=True)
    assert float(tail) == pytest.approx(1 - confidence, rel=1e-9)
    if num_wrong == 0:
        assert bound == pytest.approx(1 - (1 - confidence) ** (1 / num_answered), rel=1e-12)


@pytest.mark.parametrize("num", [0, 1, 17])
def test_risk_bound_is_1_where_nothing_is_known_to_be_right(num):
    assert risk_bound(num, num, 0.9) == 1.0


def of_confidence(confidence: torch.Tensor) -> Predictive:
    """One particle, two choices, the first with this probability [N]."""
    return predictive(torch.stack([confidence, 1 - confidence], dim=-1).log()[None])


@pytest.mark.parametrize("num_levels", [4, 50, 10_000])  # many ties, some, hardly any
def test_the_risk_of_what_is_answered_exceeds_its_target_no_more_often_than_promised(num_levels):
    # a perfectly calibrated particle: what it answers with probability p is wrong with probability 1 - p
    levels = torch.linspace(0.5, 0.99, num_levels, dtype=torch.float64)
    totals = of_confidence(levels).total
    generator = torch.Generator().manual_seed(5)
    coverages, risks = [], []
    for _ in range(40):
        asked = levels[torch.randint(num_levels, (1000,), generator=generator)]
        correct = torch.rand(1000, generator=generator, dtype=torch.float64) < asked
        policy = calibrate(of_confidence(asked), correct, target_risk=0.2, confidence=0.8)
        answered = totals <= policy.answer_below
        coverages.append(answered.double().mean().item())
        risks.append((1 - levels[answered]).mean().item())
    assert sum(risk > 0.2 for risk in risks) <= 0.2 * 40
    # a promise that is not kept by silence: at best 0.78, or 0.75 with four levels
    assert sum(coverages) / 40 > 0.5


def test_calibrate_answers_everything_where_everything_is_right():
    result = of_confidence(torch.linspace(0.6, 0.9, 100, dtype=torch.float64))
    right = torch.ones(100, dtype=torch.bool)
    # no error among 100, and 1/20 of the 5 % for each threshold
    lowest = 1 - (0.05 / NUM_CANDIDATES) ** (1 / 100)
    policy = calibrate(result, right, lowest + 1e-9, clarify_share=0.3)
    assert policy == Policy(math.log(2), 0.3)
    with pytest.raises(ValueError, match=rf"target_risk: .*{lowest:.4f}"):
        calibrate(result, right, lowest - 1e-9)


def test_calibrate_stops_below_what_is_wrong():
    confidence = torch.linspace(0.99, 0.51, 1000, dtype=torch.float64)
    result, correct = of_confidence(confidence), torch.arange(1000) < 600
    policy = calibrate(result, correct, 0.05)
    # thresholds lie 50 questions apart: 50 wrong of 650 are too many, and so are 150 of 750 for the laxer target
    assert (result.total <= policy.answer_below).sum() == 600
    more = calibrate(result, correct, 0.2)
    assert (result.total <= more.answer_below).sum() == 700


def test_questions_that_tie_come_in_together_whatever_their_order():
    confidence = torch.full((400,), 0.9, dtype=torch.float64)
    confidence[300:] = 0.6
    correct = torch.ones(400, dtype=torch.bool)
    correct[300:360] = False
    shuffled = torch.randperm(400, generator=torch.Generator().manual_seed(1))
    policies = {
        calibrate(of_confidence(confidence[order]), correct[order], 0.1) for order in (torch.arange(400), shuffled)
    }
    (policy,) = policies
    assert (of_confidence(confidence).total <= policy.answer_below).sum() == 300


def test_a_stricter_promise_answers_no_more():
    generator = torch.Generator().manual_seed(2)
    confidence = 0.5 + 0.5 * torch.rand(2000, generator=generator, dtype=torch.float64)
    correct = torch.rand(2000, generator=generator, dtype=torch.float64) < confidence
    result = of_confidence(confidence)
    thresholds = [calibrate(result, correct, 0.18, confidence=c).answer_below for c in (0.5, 0.9, 0.999)]
    assert thresholds == sorted(thresholds, reverse=True)
    assert thresholds[0] > thresholds[-1]


@pytest.mark.parametrize(
    ("correct", "target_risk", "confidence", "named"),
    [
        (torch.ones(4, dtype=torch.bool), 0.1, 0.9, "correct"),
        (torch.ones(3), 0.1, 0.9, "correct"),
        (torch.ones(3, dtype=torch.bool), 0.0, 0.9, "target_risk"),
        (torch.ones(3, dtype=torch.bool), math.nan, 0.9, "target_risk"),
        (torch.ones(3, dtype=torch.bool), 0.1, 1.0, "confidence"),
    ],
)
def test_calibrate_refuses_what_cannot_be_meant(correct, target_risk, confidence, named):
    with pytest.raises(ValueError, match=f"{named}: expected"):
        calibrate(of_probabilities([[[0.9, 0.1]] * 3]), correct, target_risk, confidence=confidence)


def test_calibrate_needs_a_question():
    with pytest.raises(ValueError, match="at least one"):
        calibrate(predictive(torch.zeros(2, 0, 4)), torch.ones(0, dtype=torch.bool), 0.1)
