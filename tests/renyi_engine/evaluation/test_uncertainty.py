"""Uncertainty splits as its definitions say, decisions follow from it, and calibration keeps its promise.

Layout: K particles, N questions, C choices.
"""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from renyi_engine.evaluation.uncertainty import (
    NUM_CANDIDATES,
    Policy,
    Predictive,
    calibrate,
    decide,
    predictive,
    risk_bound,
)


@st.composite
def log_likelihoods(draw) -> torch.Tensor:
    """[K, N, C] fp64, from nearly equal to far apart, some of it -inf, no row wholly."""
    num_particles, num_questions, num_choices = draw(st.tuples(st.integers(1, 6), st.integers(0, 4), st.integers(2, 5)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([1e-9, 0.3, 5.0, 400.0]))
    shape = (num_particles, num_questions, num_choices)
    logp = scale * torch.randn(shape, generator=generator, dtype=torch.float64) - 50.0
    impossible = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.5]))
    impossible.scatter_(2, torch.randint(num_choices, shape, generator=generator), False)
    return logp.masked_fill(impossible, -torch.inf)


def entropy(p: torch.Tensor) -> torch.Tensor:
    """- sum_c p_c log p_c, 0 log 0 = 0, the obvious way."""
    return -torch.where(p > 0, p * p.clamp(min=1e-320).log(), 0.0).sum(-1)


def of_probabilities(rows: list[list[list[float]]]) -> Predictive:
    """Predictions of particles with these probabilities [K][N][C]."""
    return predictive(torch.tensor(rows, dtype=torch.float64).log())


@settings(deadline=None)
@given(logp=log_likelihoods())
def test_uncertainties_are_the_naive_formulas(logp):
    result = predictive(logp)
    p = logp.softmax(-1)
    torch.testing.assert_close(result.particles.exp(), p)
    torch.testing.assert_close(result.mixture.exp(), p.mean(0))
    torch.testing.assert_close(result.total, entropy(p.mean(0)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(result.aleatoric, entropy(p).mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(result.epistemic, entropy(p.mean(0)) - entropy(p).mean(0), rtol=1e-12, atol=1e-12)
    assert result.answers.equal(p.argmax(-1))
    for question, ratio in enumerate(result.variation_ratio.tolist()):
        votes = result.answers[:, question].tolist()
        assert ratio == pytest.approx(1 - max(votes.count(answer) for answer in votes) / len(votes))


@settings(deadline=None)
@given(logp=log_likelihoods())
def test_total_is_aleatoric_and_epistemic_and_each_is_in_its_range(logp):
    result = predictive(logp)
    torch.testing.assert_close(result.total, result.aleatoric + result.epistemic, rtol=1e-12, atol=1e-12)
    num_particles, _, num_choices = logp.shape
    assert (result.total <= math.log(num_choices)).all()
    assert all((part >= 0).all() for part in (result.total, result.aleatoric, result.epistemic))
    assert (result.epistemic <= math.log(num_particles) + 1e-12).all()
    assert all(part.dtype == torch.float64 for part in (result.total, result.mixture, result.variation_ratio))


@settings(deadline=None)
@given(logp=log_likelihoods(), data=st.data())
def test_the_order_of_the_particles_does_not_matter(logp, data):
    order = data.draw(st.permutations(range(len(logp))))
    result, permuted = predictive(logp), predictive(logp[order])
    assert permuted.answers.equal(result.answers[order])
    assert permuted.variation_ratio.equal(result.variation_ratio)
    for name in ("mixture", "total", "aleatoric", "epistemic"):
        torch.testing.assert_close(getattr(permuted, name), getattr(result, name), rtol=1e-12, atol=1e-14)


@settings(deadline=None)
@given(logp=log_likelihoods(), copies=st.integers(1, 5))
def test_equal_particles_leave_no_epistemic_uncertainty(logp, copies):
    result = predictive(logp[:1].expand(copies, -1, -1))
    assert ((result.epistemic >= 0) & (result.epistemic <= 1e-15)).all()
    assert (result.variation_ratio == 0).all()


@settings(deadline=None)
@given(logp=log_likelihoods(), shift=st.floats(-1e3, 1e3))
def test_log_likelihoods_need_not_be_normalised(logp, shift):
    torch.testing.assert_close(predictive(logp + shift).total, predictive(logp).total, rtol=1e-9, atol=1e-11)


def test_particles_that_are_sure_of_different_answers_are_all_epistemic():
    result = of_probabilities([[[1.0, 0.0, 0.0]], [[0.0, 1.0, 0.0]], [[0.0, 0.0, 1.0]], [[0.0, 1.0, 0.0]]])
    expected = 0.5 * math.log(2) + 0.5 * math.log(4)  # entropy of 1/4, 1/2, 1/4
    assert result.total.item() == pytest.approx(expected, rel=1e-14)
    assert result.epistemic.item() == pytest.approx(expected, rel=1e-14)
    assert result.aleatoric.item() == 0.0
    assert result.variation_ratio.item() == 0.5
    assert result.answer.item() == 1


def test_a_small_disagreement_is_half_the_weighted_variance_of_the_log_probabilities():
    # p and q = p (1 + e d): mean KL to the mixture is e^2/8 sum_c p_c d_c^2 to leading order
    p = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    d = torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)
    small = 1e-5
    epistemic = predictive(torch.stack([p, p * (1 + small * d)])[:, None].log()).epistemic.item()
    assert epistemic == pytest.approx(small**2 / 8, rel=1e-4)


def test_the_mixture_may_answer_what_the_fewest_particles_vote_for():
    result = of_probabilities([[[0.51, 0.49]], [[0.51, 0.49]], [[0.01, 0.99]]])
    assert result.answers[:, 0].tolist() == [0, 0, 1]
    assert result.answer.item() == 1
    assert result.variation_ratio.item() == pytest.approx(1 / 3)


def test_fp32_log_likelihoods_of_long_answers_are_taken_apart_in_fp64():
    logp = torch.tensor([[[-1e5, -1e5 - 1.0]], [[-3e4, -2e3]]])
    result = predictive(logp)
    expected = entropy(torch.tensor([1 / (1 + math.exp(-1.0)), 1 / (1 + math.e)], dtype=torch.float64)) / 2
    assert result.aleatoric.item() == pytest.approx(expected.item(), rel=1e-14)


@pytest.mark.parametrize("bad", [[-math.inf] * 3, [0.0, math.nan, -1.0], [0.0, math.inf, -1.0]])
def test_a_row_that_gives_no_probabilities_is_named(bad):
    logp = torch.zeros(3, 5, 3)
    logp[1, 4] = torch.tensor(bad)
    with pytest.raises(ValueError, match=r"logp: .*particle 1 for question 4"):
        predictive(logp)


@pytest.mark.parametrize("shape", [(3, 4), (0, 3, 4), (2, 3, 0), (2, 3, 4, 1)])
def test_a_shape_that_is_not_particles_questions_choices_is_refused(shape):
    with pytest.raises(ValueError, match="logp: expected"):
        predictive(torch.zeros(shape))


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
