"""The weights of an ensemble's particles are the posterior (10) of a space of K parameters.

Without a prior they are EM's fixed point w_k = mean_i r_ki; the KL from equal weights damps it.
K particles, N examples.
"""

from __future__ import annotations

import pytest
import torch

from renyi_engine.objectives import fit_particle_weights
from renyi_engine.theory.finite import self_consistent_posterior
from renyi_kernels import renyi_reduce

K, N = 4, 40
UNIFORM = torch.full((K,), 1 / K, dtype=torch.float64)

close = torch.testing.assert_close
every_alpha = pytest.mark.parametrize("alpha", [0.1, 0.4, 1.0, 2.5])


@pytest.fixture
def logp():
    """[K, N]: each particle is the best for some examples, the first for most; the last is never needed."""
    noise = torch.randn(K, N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    s = noise - 4.0
    s[0, ::2] += 2.5
    s[1, 1::4] += 3.0
    s[2, 3::4] += 3.0
    return s


def mean_responsibilities(logp, alpha, weights):
    return renyi_reduce(logp, alpha, weights=weights).responsibilities.mean(dim=1)


@every_alpha
@pytest.mark.parametrize("weight", [0.05, 1.0, 30.0])
def test_the_posterior_over_the_particles_is_the_damped_fixed_point(logp, alpha, weight):
    found = self_consistent_posterior(logp, UNIFORM, alpha, weight, tolerance=1e-11)
    w = found.probabilities
    terms = torch.special.xlogy(w, w / UNIFORM)  # of KL(w || uniform)
    assert terms.sum() > 1e-4  # not the trivial solution
    damped = w * N / alpha + weight * (terms - w * terms.sum())
    close(N * mean_responsibilities(logp, alpha, w) / alpha, damped, rtol=1e-8, atol=1e-8 * N / alpha)


@every_alpha
def test_without_the_prior_it_is_the_fixed_point_of_em(logp, alpha):
    fixed = fit_particle_weights(logp, alpha)
    close(mean_responsibilities(logp, alpha, fixed), fixed, rtol=0, atol=1e-5)
    apart = [
        (self_consistent_posterior(logp, UNIFORM, alpha, weight).probabilities - fixed).abs().sum().item()
        for weight in (10.0, 0.1, 1e-3)
    ]
    assert apart[0] > 10 * apart[1] > 100 * apart[2]
    assert apart[2] < 1e-3


@every_alpha
def test_a_step_of_em_never_raises_the_loss_and_stops_only_where_the_loss_is_least(logp, alpha):
    weights, losses = torch.tensor([0.01, 0.01, 0.08, 0.9], dtype=torch.float64), []
    for _ in range(30):
        losses.append(renyi_reduce(logp, alpha, weights=weights).loss.mean())
        weights = mean_responsibilities(logp, alpha, weights)
    losses = torch.stack(losses)
    assert losses[1] < losses[0]
    assert (losses.diff() <= 1e-14).all()
    assert losses[-1] > renyi_reduce(logp, alpha, weights=fit_particle_weights(logp, alpha)).loss.mean() - 1e-8
