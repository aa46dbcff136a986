"""Uncertainty splits as its definitions say.

Layout: K particles, N questions, C choices.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from renyi_engine.evaluation.uncertainty import Predictive, predictive


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


@st.composite
def distributions(draw, num_particles: int) -> torch.Tensor:
    """[K] fp64, some of it 0, never all of it."""
    parts = draw(st.lists(st.sampled_from([0.0, 0.01, 1.0, 3.0]), min_size=num_particles, max_size=num_particles))
    parts[draw(st.integers(0, num_particles - 1))] = 2.0
    return torch.tensor(parts, dtype=torch.float64) / sum(parts)


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


NUMBERS = ("mixture", "answer", "total", "aleatoric", "epistemic", "variation_ratio")


@settings(deadline=None)
@given(logp=log_likelihoods(), data=st.data())
def test_with_weights_a_particle_is_drawn_by_its_weight(logp, data):
    weights = data.draw(distributions(len(logp)))
    result, w, p = predictive(logp, weights), weights.tolist(), logp.softmax(-1).tolist()
    for question in range(logp.shape[1]):
        each = [particle[question] for particle in p]
        mixture = [math.fsum(wk * pk[c] for wk, pk in zip(w, each, strict=True)) for c in range(logp.shape[2])]
        apart = [
            math.fsum(a * math.log(a / b) for a, b in zip(pk, mixture, strict=True) if a > 0) if wk else 0.0
            for wk, pk in zip(w, each, strict=True)
        ]
        own = [-math.fsum(a * math.log(a) for a in pk if a > 0) for pk in each]
        votes = [math.fsum(wk for wk, pk in zip(w, each, strict=True) if pk.index(max(pk)) == c) for c in range(5)]
        tight = {"rel": 1e-11, "abs": 1e-12}
        assert result.mixture[question].exp().tolist() == pytest.approx(mixture, **tight)
        assert result.epistemic[question].item() == pytest.approx(
            sum(a * b for a, b in zip(w, apart, strict=True)), **tight
        )
        assert result.aleatoric[question].item() == pytest.approx(
            sum(a * b for a, b in zip(w, own, strict=True)), **tight
        )
        total = -math.fsum(a * math.log(a) for a in mixture if a > 0)
        assert result.total[question].item() == pytest.approx(total, **tight)
        assert result.variation_ratio[question].item() == pytest.approx(1 - max(votes), **tight)


@settings(deadline=None)
@given(logp=log_likelihoods(), data=st.data())
def test_a_particle_of_weight_0_is_as_if_it_were_not_there_and_two_halves_are_as_the_whole(logp, data):
    weights = data.draw(distributions(len(logp)))
    result, counts = predictive(logp, weights), weights > 0
    halves = torch.cat([weights[:1] / 2, weights[:1] / 2, weights[1:]])
    for other in (predictive(logp[counts], weights[counts]), predictive(torch.cat([logp[:1], logp]), halves)):
        for name in NUMBERS:
            torch.testing.assert_close(getattr(other, name), getattr(result, name), rtol=1e-12, atol=1e-12)


@settings(deadline=None)
@given(logp=log_likelihoods())
def test_equal_weights_are_no_weights_bit_for_bit(logp):
    equal = predictive(logp, torch.full((len(logp),), 1 / len(logp), dtype=torch.float64))
    for name in NUMBERS:
        assert torch.equal(getattr(equal, name), getattr(predictive(logp), name))


@pytest.mark.parametrize(
    ("weights", "error"),
    [
        (torch.tensor([0.5, 0.6]), ValueError),
        (torch.tensor([1.5, -0.5]), ValueError),
        (torch.full((3,), 1 / 3), ValueError),
        (torch.tensor([1, 0]), TypeError),
    ],
)
def test_weights_that_are_no_distribution_over_the_particles_are_refused(weights, error):
    with pytest.raises(error, match="weights: expected"):
        predictive(torch.zeros(2, 3, 4), weights)


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
