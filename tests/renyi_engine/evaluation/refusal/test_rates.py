"""Rates, variances and their errors against naive loops in fp64, exact enumeration, and simulation."""

from __future__ import annotations

import itertools
import math
import statistics

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from renyi_engine.evaluation.refusal import rates


def drawn(seed, K=4, N=7, n=5, missing=0.0):
    """(refused, judged), each [K, N]."""
    generator = np.random.default_rng(seed)
    judged = generator.binomial(n, 1 - missing, (K, N))
    return generator.binomial(judged, generator.random((K, N))), judged


def naive_rates(refused, judged):
    return [
        [r / j if j else None for r, j in zip(*rows, strict=True)]
        for rows in zip(refused.tolist(), judged.tolist(), strict=True)
    ]


WEIGHTS = (None, np.array([0.6, 0.1, 0.3]))


def spread(x, w):
    """var_k: half the mean squared difference of two different particles, drawn by their weights."""
    pairs = [(i, j) for i in range(len(x)) for j in range(len(x)) if i != j]
    w = [1 / len(x)] * len(x) if w is None else w
    return sum(w[i] * w[j] * (x[i] - x[j]) ** 2 for i, j in pairs) / sum(w[i] * w[j] for i, j in pairs) / 2


def particle_means(p, without=None):
    return [statistics.fmean(x for i, x in enumerate(row) if x is not None and i != without) for row in p]


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32), K=st.integers(1, 5), N=st.integers(3, 9), n=st.integers(1, 6), missing=st.floats(0, 0.3)
)
def test_rate_and_variance_are_those_of_the_particles_means_and_their_errors_leave_one_prompt_out(
    seed, K, N, n, missing
):
    refused, judged = drawn(seed, K, N, n, missing)
    p = naive_rates(refused, judged)
    array = rates.prompt_rates(refused, judged)
    assert np.array_equal(np.isnan(array), [[x is None for x in row] for row in p])
    for statistic, ours in (
        (statistics.fmean, rates.refusal_rate(array)),
        (statistics.variance if K > 1 else None, rates.variance_over_particles(array)),
    ):
        if statistic is None:
            assert ours == (None, None)
            continue
        held = [i for i in range(N) if any(row[i] is not None for row in p)]
        if any(sum(x is not None for x in row) < 2 for row in p):
            assert ours.standard_error is None
            continue
        left_out = [statistic(particle_means(p, without=i)) for i in held]
        error = math.sqrt((len(held) - 1) / len(held) * sum((t - statistics.fmean(left_out)) ** 2 for t in left_out))
        assert ours.value == pytest.approx(statistic(particle_means(p)), abs=1e-12)
        assert ours.standard_error == pytest.approx(error, abs=1e-9)


def test_the_error_of_a_rate_is_that_of_a_mean_of_clusters():
    array = rates.prompt_rates(*drawn(3))
    for rows in (array, array[2:3]):
        means = rows.mean(axis=0)
        assert rates.refusal_rate(rows).standard_error == pytest.approx(statistics.stdev(means) / math.sqrt(7))
    values = np.array([0.5, np.nan, -0.2, 0.4])
    known = [0.5, -0.2, 0.4]
    assert rates.mean_over_prompts(values) == pytest.approx(
        (statistics.fmean(known), statistics.stdev(known) / math.sqrt(3))
    )


def test_errors_are_those_of_the_bootstrap_over_prompts():
    generator = np.random.default_rng(0)
    # particles that differ: where they do not, no resampling tells the error of their variance
    array = generator.binomial(4, generator.beta([[1], [2], [3], [4], [6]], 3, (5, 400))) / 4
    picks = generator.integers(0, 400, (2000, 400))
    means = np.stack([array[:, pick].mean(axis=1) for pick in picks])
    assert rates.refusal_rate(array).standard_error == pytest.approx(means.mean(axis=1).std(), rel=0.1)
    assert rates.variance_over_particles(array).standard_error == pytest.approx(
        means.var(axis=1, ddof=1).std(), rel=0.1
    )


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32), K=st.integers(2, 5))
def test_with_weights_the_mean_and_the_variance_are_those_of_particles_drawn_by_them(seed, K):
    p = rates.prompt_rates(*drawn(seed, K))
    w = np.random.default_rng(seed).dirichlet([1.0] * K)
    left_out = [[p[:, np.arange(7) != i].mean(axis=1) for i in range(7)], [p.mean(axis=1)]]
    for statistic, ours in (
        (lambda x: sum(w * x), rates.refusal_rate(p, w)),
        (lambda x: spread(x, w), rates.variance_over_particles(p, w)),
    ):
        without, [whole] = [[statistic(means) for means in which] for which in left_out]
        assert ours.value == pytest.approx(whole)
        error = math.sqrt(6 / 7 * sum((t - statistics.fmean(without)) ** 2 for t in without))
        assert ours.standard_error == pytest.approx(error)
    # a particle drawn once: what no copy of a particle changes
    once = [
        (1 - np.sum(weights**2)) * rates.variance_within_prompts(rows, weights)
        for rows, weights in ((p, w), (np.concatenate([p[:1], p]), np.concatenate([w[:1] / 2, w[:1] / 2, w[1:]])))
    ]
    assert once[0] == pytest.approx(once[1])
    assert once[0] == pytest.approx((w @ p**2) - (w @ p) ** 2)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("n", [2, 3, 5])
def test_disagreement_is_without_bias_and_the_variance_is_too_large_by_the_noise(n, weights):
    truth = np.array([0.1, 0.5, 0.85])
    columns = list(itertools.product(range(n + 1), repeat=3))  # every outcome of three particles
    chance = [
        math.prod(math.comb(n, c) * t**c * (1 - t) ** (n - c) for c, t in zip(column, truth, strict=True))
        for column in columns
    ]
    refused = np.array(columns).T
    judged = np.full_like(refused, n)
    p = rates.prompt_rates(refused, judged)
    expected = spread(truth, weights)
    if weights is None:
        assert expected == pytest.approx(truth.var(ddof=1))
        noise = (truth * (1 - truth)).mean() / n
    else:
        noise = np.average(truth * (1 - truth) / n, weights=weights * (1 - weights))
    assert np.dot(rates.disagreement(p, judged, weights), chance) == pytest.approx(expected)
    assert np.dot(rates.variance_within_prompts(p, weights), chance) == pytest.approx(expected + noise)
    assert np.dot(rates.sampling_noise(p, judged, weights), chance) == pytest.approx(noise)


def test_disagreement_of_a_prompt_by_hand():
    # two particles, four samples each: 1 and 3 refusals. variance 1/8, noise (3/16) / 3
    p = np.array([[0.25, 0.5, 0.0], [0.75, 0.5, 1.0]])
    judged = np.full((2, 3), 4)
    assert rates.variance_within_prompts(p) == pytest.approx([1 / 8, 0, 1 / 2])
    assert rates.disagreement(p, judged) == pytest.approx([1 / 8 - 1 / 16, -1 / 12, 1 / 2])


@pytest.mark.parametrize("weights", [None, np.array([0.55, 0.0, 0.3, 0.15])], ids=["equal", "unequal"])
@pytest.mark.parametrize("n", [2, 3, 5])
def test_prompts_that_tie_by_algebra_have_one_number(n, weights):
    """Where one particle refuses once in n and no other does, the variance is the noise: p^2 = p (1 - p) / (n - 1)."""
    refused = np.concatenate([np.eye(4, dtype=int), np.zeros((4, 1), dtype=int)], axis=1)
    judged = np.full((4, 5), n)
    found = rates.disagreement(rates.prompt_rates(refused, judged), judged, weights)
    assert found.tolist() == [0.0] * 5 if weights is None else found[4] == found[1] == 0.0


@pytest.mark.parametrize("n", [3, 5])
def test_whose_refusals_they_are_does_not_matter_if_all_particles_count_alike(n):
    counts = list(itertools.product(range(n + 1), repeat=3))
    judged = np.full((3, len(counts)), n)
    found = rates.disagreement(rates.prompt_rates(np.array(counts).T, judged), judged)
    of_counts = {}
    for column, value in zip(counts, found, strict=True):
        assert of_counts.setdefault(tuple(sorted(column)), value) == value


def test_what_is_not_defined_is_none_or_nan():
    refused, judged = np.array([[1, 0, 2], [0, 0, 0]]), np.array([[2, 1, 2], [2, 2, 0]])
    p = rates.prompt_rates(refused, judged)
    assert np.isnan(rates.variance_within_prompts(p)).tolist() == [False, False, True]
    assert np.isnan(rates.disagreement(p, judged)).tolist() == [False, True, True]
    assert rates.variance_over_particles(p[:1]) == (None, None)
    assert np.isnan(rates.variance_within_prompts(p[:1])).all()
    nothing = np.full((2, 2), np.nan)
    assert rates.refusal_rate(nothing) == rates.variance_over_particles(nothing) == (None, None)
    assert rates.refusal_rate(np.array([[0.5]])) == (0.5, None)
