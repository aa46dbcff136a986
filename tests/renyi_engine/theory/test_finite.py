"""The posterior of a finite space satisfies (10) and minimises its objective; thresholds are those of Example 1.

The oracles are the formulas written out with exp and log, mpmath, and an optimiser that knows nothing of (10).
M parameters, K specialists, N examples.
"""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.optimize import minimize

from renyi_engine.theory.finite import mixture_loss, objective, reweighted, self_consistent_posterior, threshold
from renyi_kernels import renyi_reduce

close = torch.testing.assert_close


def problem(num_parameters: int, num_examples: int, seed: int = 0, scale: float = 2.0):
    """(logp [M, N], prior [M]), no two entries alike."""
    generator = torch.Generator().manual_seed(seed)
    logp = -scale * torch.randn(num_parameters, num_examples, generator=generator, dtype=torch.float64).square()
    prior = torch.softmax(torch.randn(num_parameters, generator=generator, dtype=torch.float64), dim=0)
    return logp, prior


def camps(num_parameters: int, num_examples: int):
    """A grid of means for data around -1 and around +1: neighbours are nearly alike, and none fits both."""
    noise = 0.3 * torch.randn(num_examples, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    data = torch.tensor([-1.0, 1.0], dtype=torch.float64).repeat(num_examples)[:num_examples] + noise
    grid = torch.linspace(-3, 3, num_parameters, dtype=torch.float64)
    return -2.0 * (data - grid[:, None]).square(), torch.full((num_parameters,), 1 / num_parameters).double()


def naive_losses(logp, q, alpha):
    if alpha == 0.0:
        return -(q @ logp)
    return -(q @ (alpha * logp).exp()).log() / alpha


def naive_log_image(logp, q, prior, alpha, weight):
    powers = (alpha * logp).exp()
    return torch.log_softmax(prior.log() + (powers / (q @ powers)).sum(dim=1) / (weight * alpha), dim=0)


def naive_image(*arguments):
    return naive_log_image(*arguments).exp()


def naive_objective(logp, q, prior, alpha, weight):
    return naive_losses(logp, q, alpha).sum() + weight * (q * (q / prior).log()).sum()


distributions = st.lists(st.floats(-6, 6), min_size=4, max_size=4).map(
    lambda logits: torch.softmax(torch.tensor(logits, dtype=torch.float64), dim=0)
)


# the loss of a distribution over parameters


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0, 2.5])
def test_loss_and_responsibilities_of_any_distribution_are_the_formula(alpha):
    logp, q = problem(5, 7)
    out = mixture_loss(logp, q, alpha)
    close(out.loss, naive_losses(logp, q, alpha))
    weights = q[:, None] * (alpha * logp).exp()
    close(out.responsibilities, weights / weights.sum(dim=0))
    close(out.ess, 1 / out.responsibilities.square().sum(dim=0))
    assert torch.equal(out.logp, logp)


@pytest.mark.parametrize("alpha", [0.0, 0.6])
def test_a_uniform_distribution_is_an_ensemble(alpha):
    logp, _ = problem(4, 6)
    ours, theirs = mixture_loss(logp, torch.full((4,), 0.25), alpha), renyi_reduce(logp, alpha)
    close(ours.loss, theirs.loss)
    close(ours.responsibilities, theirs.responsibilities)


@pytest.mark.parametrize("alpha", [1e-14, 1e-8, 1e-3, 0.7])
def test_weights_cost_no_digits_however_small_alpha_is(alpha):
    logp, q = problem(5, 3)
    q = torch.softmax(20 * q, dim=0)
    with mpmath.workdps(60):
        weights = [mpmath.mpf(w) for w in q.tolist()]
        total = mpmath.fsum(weights)  # 1 up to rounding, which a small alpha would blow up
        expected = []
        for column in logp.T.tolist():
            powers = [w * mpmath.exp(alpha * mpmath.mpf(s)) for w, s in zip(weights, column, strict=True)]
            expected.append(float(-mpmath.log(mpmath.fsum(powers) / total) / alpha))
    close(mixture_loss(logp, q, alpha).loss, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("alpha", [0.0, 0.6])
def test_a_parameter_without_weight_does_not_count_whatever_it_says(alpha):
    logp, q = problem(4, 6)
    q[2], logp[2, :3], logp[2, 3:] = 0.0, -torch.inf, 1e4
    q, others = q / q.sum(), [0, 1, 3]
    close(mixture_loss(logp, q, alpha).loss, mixture_loss(logp[others], q[others], alpha).loss)


@pytest.mark.parametrize("alpha", [0.0, 0.6])
def test_an_example_without_mass_costs_infinity(alpha):
    logp, q = problem(3, 4)
    logp[:, 1] = -torch.inf
    assert mixture_loss(logp, q, alpha).loss.isinf().tolist() == [False, True, False, False]


# equation (10)


@pytest.mark.parametrize(("alpha", "weight"), [(0.4, 1.0), (1.0, 0.3), (1.7, 2.5)])
def test_the_map_of_10_is_the_formula_and_follows_from_the_slope_of_the_objective(alpha, weight):
    logp, prior = problem(5, 7)
    q = torch.softmax(torch.arange(5.0).double(), dim=0).requires_grad_()
    image = reweighted(logp, q.detach(), prior, alpha, weight)
    close(image, naive_image(logp, q.detach(), prior, alpha, weight))
    # where g is the slope of the data term, prior exp(-g / lambda) minimises g.q + lambda KL(q || prior)
    (slope,) = torch.autograd.grad(objective(logp, q, prior, alpha, weight), q)
    of_divergence = weight * ((q / prior).log() + 1)
    close(image, torch.softmax(prior.log() - (slope - of_divergence) / weight, dim=0).detach())


SETTINGS = [(1.0, 1.0), (0.3, 1.0), (0.8, 0.05), (1.6, 2.5), (1e-3, 0.2)]


@pytest.mark.parametrize(("alpha", "weight"), SETTINGS)
def test_the_posterior_reproduces_itself(alpha, weight):
    logp, prior = problem(6, 9)
    found = self_consistent_posterior(logp, prior, alpha, weight)
    assert found.converged
    close(found.probabilities, naive_image(logp, found.probabilities, prior, alpha, weight), rtol=0, atol=1e-7)
    assert found.residual <= 1e-8
    assert 0 <= found.gap_nats <= 1e-8
    close(torch.tensor(found.trace_nats[-1]).double(), naive_objective(logp, found.probabilities, prior, alpha, weight))


@pytest.mark.parametrize(("alpha", "weight"), SETTINGS)
def test_an_optimiser_that_knows_nothing_of_10_finds_the_same_posterior(alpha, weight):
    logp, prior = problem(4, 6, seed=1)

    def value_and_slope(array):
        logits = torch.from_numpy(array).requires_grad_()
        value = naive_objective(logp, torch.softmax(logits, dim=0), prior, alpha, weight)
        return value.item(), torch.autograd.grad(value, logits)[0].numpy()

    best = minimize(value_and_slope, torch.zeros(4).double().numpy(), jac=True, method="BFGS", options={"gtol": 1e-9})
    found = self_consistent_posterior(logp, prior, alpha, weight)
    assert found.trace_nats[-1] <= best.fun + 1e-10
    close(found.probabilities, torch.softmax(torch.from_numpy(best.x), dim=0), rtol=0, atol=1e-4)


@settings(deadline=None, max_examples=60)
@given(q=distributions, alpha=st.sampled_from([0.0, 0.2, 1.0, 2.2]), weight=st.sampled_from([0.1, 1.0, 3.0]))
def test_nothing_beats_the_posterior_and_the_gap_bounds_how_much_worse_anything_is(q, alpha, weight):
    logp, prior = problem(4, 6, seed=2)
    found = self_consistent_posterior(logp, prior, alpha, weight)
    excess = (objective(logp, q, prior, alpha, weight) - found.trace_nats[-1]).item()
    bound = weight * (q * (q / reweighted(logp, q, prior, alpha, weight)).log()).sum().item()
    assert -1e-9 <= excess <= bound + 1e-9


@pytest.mark.parametrize("max_iterations", [0, 1, 2, 4])
def test_the_gap_of_an_unfinished_search_bounds_what_is_missing(max_iterations):
    logp, prior = camps(30, 40)
    best = self_consistent_posterior(logp, prior, 0.9, 0.1).trace_nats[-1]
    cut = self_consistent_posterior(logp, prior, 0.9, 0.1, max_iterations=max_iterations)
    assert not cut.converged
    assert cut.num_iterations == max_iterations
    assert 1e-6 < cut.trace_nats[-1] - best <= cut.gap_nats
    q = cut.probabilities
    log_image = naive_log_image(logp, q, prior, 0.9, 0.1)
    close(cut.gap_nats, 0.1 * (q * (q.log() - log_image)).sum().item(), rtol=1e-9, atol=0)
    close(cut.residual, 0.5 * (q - log_image.exp()).abs().sum().item(), rtol=1e-9, atol=0)


def test_at_alpha_0_it_is_the_gibbs_posterior():
    logp, prior = problem(5, 7)
    found = self_consistent_posterior(logp, prior, 0.0, 1.3)
    close(found.probabilities, torch.softmax(prior.log() + logp.sum(dim=1) / 1.3, dim=0))
    close(reweighted(logp, prior, prior, 0.0, 1.3), found.probabilities)
    close(found.trace_nats, (naive_objective(logp, found.probabilities, prior, 0.0, 1.3).item(),))
    assert found.converged


def test_it_tends_to_the_gibbs_posterior_in_proportion_to_alpha():
    logp, prior = problem(5, 7)
    gibbs = self_consistent_posterior(logp, prior, 0.0, 1.3).probabilities
    distance = [
        (self_consistent_posterior(logp, prior, alpha, 1.3, tolerance=1e-12).probabilities - gibbs).abs().sum().item()
        for alpha in (1e-3, 1e-5)
    ]
    assert 0 < distance[0] < 0.05
    assert distance[0] / distance[1] == pytest.approx(100, rel=0.05)


@pytest.mark.parametrize(
    ("alpha", "weight", "num_examples"), [(0.9, 1e-3, 300), (1.0, 1e-6, 50), (0.05, 1e-2, 2000), (1e-9, 1e-3, 300)]
)
def test_stiff_problems_converge_in_few_steps_and_never_rise(alpha, weight, num_examples):
    for logp, prior in (problem(30, num_examples, scale=300.0), camps(40, num_examples)):
        found = self_consistent_posterior(logp, prior, alpha, weight)
        assert found.converged
        assert found.num_iterations <= 100
        trace = torch.tensor(found.trace_nats, dtype=torch.float64)
        assert (trace.diff() <= 1e-13 * trace.abs().max()).all()
        # at the prior there is no divergence
        assert trace[0] == pytest.approx(mixture_loss(logp, prior, alpha).loss.sum().item(), rel=1e-9)


def test_one_parameter_has_it_all():
    logp, _ = problem(1, 5)
    found = self_consistent_posterior(logp, torch.ones(1), 0.8, 0.7)
    assert found.probabilities.tolist() == [1.0]
    assert found.converged
    assert found.trace_nats[-1] == pytest.approx(-logp.sum().item())


@pytest.mark.parametrize("alpha", [0.0, 0.8])
def test_parameters_that_say_the_same_keep_the_odds_of_the_prior(alpha):
    logp, prior = problem(4, 6)
    logp[1] = logp[3]
    q = self_consistent_posterior(logp, prior, alpha, 0.2).probabilities
    assert (q[1] / q[3]).item() == pytest.approx((prior[1] / prior[3]).item(), rel=1e-9)
    flat = self_consistent_posterior(logp[:1].expand(4, 6), prior, alpha, 0.2)
    close(flat.probabilities, prior)


@pytest.mark.parametrize("alpha", [0.0, 0.8])
def test_what_the_prior_rules_out_stays_out(alpha):
    logp, prior = problem(4, 6)
    prior[2] = 0.0
    prior, others = prior / prior.sum(), [0, 1, 3]
    q = self_consistent_posterior(logp, prior, alpha, 0.5).probabilities
    assert q[2] == 0.0
    close(q[others], self_consistent_posterior(logp[others], prior[others], alpha, 0.5).probabilities)


def test_a_parameter_that_neither_the_prior_nor_q_allows_costs_nothing():
    logp, _ = problem(3, 4)
    prior, q = torch.tensor([0.3, 0.7, 0.0]).double(), torch.tensor([0.6, 0.4, 0.0]).double()
    expected = naive_objective(logp[:2], q[:2], prior[:2], 0.6, 1.7)
    close(objective(logp, q, prior, 0.6, 1.7), expected)
    assert objective(logp, prior.flip(0), prior, 0.6, 1.7) == math.inf
    gibbs = self_consistent_posterior(logp, prior, 0.0, 1.7)
    assert gibbs.trace_nats[0] == pytest.approx(objective(logp, gibbs.probabilities, prior, 0.0, 1.7).item())
    # and what it would say has no part in (10)
    logp[2] = 900.0
    close(reweighted(logp, q, prior, 0.6, 1.7)[:2], naive_image(logp[:2], q[:2], prior[:2], 0.6, 1.7))


def test_a_weight_that_overflows_is_an_error_and_no_nan():
    logp, q = torch.tensor([[0.0], [900.0]]), torch.tensor([1.0, 0.0])
    with pytest.raises(ValueError, match="their ratio overflows; give it more mass"):
        reweighted(logp, q, torch.tensor([0.5, 0.5]), 1.0, 1.0)


def test_a_parameter_that_rules_an_example_out_keeps_some_probability_above_alpha_0_and_none_at_it():
    logp, prior = problem(4, 6)
    logp[2, 1] = -torch.inf
    found = self_consistent_posterior(logp, prior, 0.8, 2.0)
    assert found.converged
    assert found.probabilities[2] > 1e-6
    close(found.probabilities, naive_image(logp, found.probabilities, prior, 0.8, 2.0), rtol=0, atol=1e-7)
    assert self_consistent_posterior(logp, prior, 0.0, 2.0).probabilities[2] == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logp": torch.zeros(3)}, "logp: expected [M, N]"),
        ({"logp": torch.zeros(3, 0)}, "logp: expected [M, N]"),
        ({"logp": torch.tensor([[0.0, 1.0], [0.0, math.nan], [0.0, 0.0]])}, "got nan at [1, 1]"),
        ({"logp": torch.full((3, 2), torch.inf)}, "got inf at [0, 0]"),
        ({"logp": torch.tensor([[0.0, -torch.inf]] * 3)}, "allows example 1"),
        ({"prior": torch.tensor([0.5, 0.5])}, "prior: expected [M] = [3]"),
        ({"prior": torch.tensor([0.5, 0.5, 0.5])}, "prior: expected probabilities >= 0 with sum 1"),
        ({"prior": torch.tensor([1.5, -0.5, 0.0])}, "prior: expected probabilities >= 0"),
        ({"prior": torch.tensor([1.0, math.nan, 0.0])}, "prior: expected probabilities >= 0"),
        ({"alpha": -0.1}, "alpha: expected a finite number >= 0"),
        ({"alpha": math.nan}, "alpha"),
        ({"weight": 0.0}, "weight: expected a finite lambda > 0"),
        ({"weight": -1.0}, "weight"),
        ({"weight": math.inf}, "weight"),
    ],
)
def test_what_is_wrong_is_named(change, message):
    arguments = {"logp": torch.zeros(3, 2), "prior": torch.full((3,), 1 / 3), "alpha": 0.5, "weight": 1.0} | change
    with pytest.raises(ValueError) as error:
        self_consistent_posterior(**arguments)
    assert message in str(error.value)


def test_where_no_distribution_has_a_finite_objective_the_error_says_so():
    logp = torch.tensor([[0.0, -torch.inf], [-torch.inf, 0.0]])
    prior = torch.tensor([0.5, 0.5])
    assert self_consistent_posterior(logp, prior, 0.5, 1.0).converged
    with pytest.raises(ValueError, match="must allow all examples"):
        self_consistent_posterior(logp, prior, 0.0, 1.0)
    with pytest.raises(ValueError, match="q > 0 that allows example 1; widen its support"):
        reweighted(logp, torch.tensor([1.0, 0.0]), prior, 0.5, 1.0)


# Example 1


def logs(*likelihoods):
    return torch.tensor(likelihoods, dtype=torch.float64).log()


def test_specialists_of_example_1_win_from_one_half():
    assert threshold(logs([0.9], [0.1]), logs(0.4)) == pytest.approx(0.5, abs=1e-14)


@pytest.mark.parametrize("generalist", [0.95, 0.9])
def test_a_generalist_as_good_as_the_best_specialist_is_never_beaten(generalist):
    assert threshold(logs([0.9], [0.1]), logs(generalist)) == math.inf


@pytest.mark.parametrize("generalist", [0.25, 0.3 - 1e-12, 0.0])
def test_a_generalist_below_the_geometric_mean_is_beaten_from_the_start(generalist):
    assert threshold(logs([0.9], [0.1]), logs(generalist)) == 0.0


@pytest.mark.parametrize("one", [[0.3], [0.5], [0.0]])
def test_one_specialist_is_better_or_it_is_not(one):
    assert threshold(logs(one), logs(0.3)) == (0.0 if one[0] > 0.3 else math.inf)


@pytest.mark.parametrize("generalist", [0.899, 0.55, 0.3 + 1e-9])
def test_thresholds_of_one_example_agree_with_mpmath(generalist):
    with mpmath.workdps(40):
        a, b, g = (mpmath.mpf(p) for p in (0.9, 0.1, generalist))
        gain = lambda alpha: mpmath.log((a**alpha + b**alpha) / 2) / alpha - mpmath.log(g)
        expected = float(mpmath.findroot(gain, (mpmath.mpf("1e-12"), 2000), solver="anderson", tol=1e-30))
    assert threshold(logs([0.9], [0.1]), logs(generalist)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_threshold_of_a_table_is_where_the_sign_of_the_total_changes(share):
    specialists, _ = problem(3, 8, seed=4)
    worst, best = specialists.mean(dim=0), specialists.amax(dim=0)
    generalist = worst + share * (best - worst) * torch.linspace(0.5, 1.4, 8)
    alpha = threshold(specialists, generalist)
    gain = lambda a: ((a * specialists).exp().mean(dim=0).log() / a - generalist).sum()
    assert 0 < alpha < math.inf
    assert gain(alpha * 0.999) < 0 < gain(alpha * 1.001)


def test_a_specialist_may_rule_examples_out():
    # each knows one of two examples: the loss is -log(0.9) + log(2) / alpha an example
    specialists, generalist = logs([0.9, 0.0], [0.0, 0.9]), logs(0.5, 0.5)
    assert threshold(specialists, generalist) == pytest.approx(math.log(2) / math.log(0.9 / 0.5), rel=1e-12)
    assert threshold(logs([0.9, 0.0]), logs(0.5, 0.0)) == math.inf


@pytest.mark.parametrize(
    ("specialists", "generalist", "message"),
    [
        (torch.zeros(2), torch.zeros(1), "specialists: expected [K, N]"),
        (torch.zeros(2, 3), torch.zeros(2), "generalist: expected [N] = [3]"),
        (torch.zeros(2, 3), torch.tensor([0.0, math.nan, 0.0]), "generalist: expected log-likelihoods"),
    ],
)
def test_tables_that_do_not_fit_are_named(specialists, generalist, message):
    with pytest.raises(ValueError) as error:
        threshold(specialists, generalist)
    assert message in str(error.value)
