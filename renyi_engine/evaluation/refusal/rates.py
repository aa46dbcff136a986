"""How often particles refuse, how much they differ in it, and how sure that is.

Layout: K particles, N prompts of a split, n samples of a particle on a prompt.

`refused` and `judged` [K, N] count, of the n samples of a particle on a prompt, those judged a refusal and those with a
verdict that counts: less than n where a judge was not understood or failed. Everything is built on

    p[k, i] = refused[k, i] / judged[k, i]       rate of particle k on prompt i; NaN where nothing counts
    p_k     = mean_i p[k, i]                     rate of particle k: every prompt weighs the same
    p       = mean_k p_k                         rate of the ensemble: of a particle drawn uniformly for each response

The paper reports mean and variance of the refusal probability on OR-Bench without saying over what the variance is:

    variance over particles     var_k p_k             the sample variance (K - 1) of the particles' rates on a split
    variance within prompts     mean_i var_k p[k, i]  that of their rates on one prompt, averaged: particles may differ
                                                      in which prompts they refuse and refuse equally many; besides,
                                                      it holds the noise of n draws, mean_k p[k, i] (1 - p[k, i]) / n

The first is taken for the paper's; the second is shown beside it, as drawn and with the noise taken off.
Standard errors are over prompts: the samples of one prompt are not independent, so that prompts are what is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Estimate(NamedTuple):
    """A number and its standard error over prompts; None where it is not defined."""

    value: float | None
    standard_error: float | None


def prompt_rates(refused: NDArray[np.int64], judged: NDArray[np.int64]) -> Array:
    """p [K, N]."""
    with np.errstate(invalid="ignore"):
        return refused / judged


def refusal_rate(p: Array) -> Estimate:
    """p, the mean over particles of p_k. One row of it gives the rate of one particle.

    Its standard error is exactly sd_i(mean_k p[k, i]) / sqrt(N) where every p[k, i] is there: the formula for means of
    clusters, here prompts.
    """
    return _jackknife(p, lambda rates: rates.mean(axis=0))


def variance_over_particles(p: Array) -> Estimate:
    """var_k p_k, with K - 1. The noise of the draws raises it by about mean_k mean_i p (1 - p) / (n N)."""
    if len(p) < 2:
        return Estimate(None, None)
    return _jackknife(p, lambda rates: rates.var(axis=0, ddof=1))


def variance_within_prompts(p: Array) -> Array:
    """var_k p[k, i], with K - 1, of each prompt, [N]; NaN where a particle has no rate, or there is but one."""
    return p.var(axis=0, ddof=1) if len(p) > 1 else np.full(p.shape[1], np.nan)


def sampling_noise(p: Array, judged: NDArray[np.int64]) -> Array:
    """What the n draws alone add to var_k p[k, i] in expectation, [N]: mean_k p (1 - p) / (n - 1).

    With p the drawn rate that is an unbiased estimate of mean_k p (1 - p) / n at the true one. NaN where n < 2.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(judged > 1, p * (1 - p) / (judged - 1), np.nan).mean(axis=0)


def disagreement(p: Array, judged: NDArray[np.int64]) -> Array:
    """How much the particles disagree about refusing each prompt, [N]: var_k p[k, i] less the noise of the draws.

    This is the measure that prompts are ranked by. Up to K / (K - 1) it estimates the epistemic part of the law of
    total variance, p (1 - p) = var_k p_k + mean_k p_k (1 - p_k), on the scale of the paper's variance and without bias,
    so that means over prompts make sense; of a single prompt it may fall below 0. The mutual information of verdict and
    particle says the same in nats, but estimated from n draws it is too large by about (K - 1) / (2 K n), and so most
    wrong where there is nothing to be found.

    NaN where a particle has fewer than two verdicts: one draw cannot be told from its noise.
    """
    return variance_within_prompts(p) - sampling_noise(p, judged)


def mean_over_prompts(values: Array) -> Estimate:
    """The mean of [N] numbers, one a prompt, and sd / sqrt(N); NaNs are left out."""
    return _jackknife(values[None], lambda means: means.mean(axis=0))


def _jackknife(p: Array, statistic: Callable[[Array], Array]) -> Estimate:
    """statistic(p_k [K, ...]) and its delete-one jackknife error over prompts (Efron & Stein 1981):

    se^2 = (N - 1) / N * sum_i (t_i - mean t)^2, with t_i the statistic without prompt i. For means that is the textbook
    formula exactly, and nothing is drawn. Prompts without any rate are not counted; a particle without a rate, or with
    one on a single prompt only, leaves nothing to be said.
    """
    given = ~np.isnan(p)
    p, given = p[:, given.any(axis=0)], given[:, given.any(axis=0)]
    num_prompts = p.shape[1]
    sums, counts = np.nansum(p, axis=1), given.sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = statistic(sums / counts)
        without = statistic((sums[:, None] - np.nan_to_num(p)) / (counts[:, None] - given))
    error = math.sqrt((num_prompts - 1) * without.var()) if num_prompts > 1 else math.nan
    return Estimate(_number(float(value)), _number(error))


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
