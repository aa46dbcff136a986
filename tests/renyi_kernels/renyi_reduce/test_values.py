"""renyi_reduce gives the values that the paper defines.

Layout: K particles, B sequences, T tokens; numbers are those of arXiv 2605.27747.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, strategies as st

from renyi_kernels import renyi_reduce

from ..marks import ALPHAS, every_alpha
from .definitions import (
    RELATIVE,
    TINY,
    every_dtype,
    every_path,
    every_positive_alpha,
    log_likelihoods,
    oracle,
    property_test,
    scale,
    variance,
)

# values


@every_path
@pytest.mark.parametrize("alpha", [*ALPHAS, 1e-12])
@property_test
@given(s=log_likelihoods())
def test_loss_responsibilities_and_gradient_equal_the_definitions_in_60_digits(
    reduce, uneven, alpha, backend, dtype, s
):
    s, upstream = s.to(dtype).requires_grad_(), uneven(s.shape[1:])
    loss, responsibilities = oracle(s, alpha)
    out = reduce(s, alpha, backend)
    assert out.loss.dtype == out.responsibilities.dtype == out.ess.dtype == out.logp.dtype == dtype
    torch.testing.assert_close(out.loss.double(), loss, rtol=RELATIVE[dtype], atol=TINY)
    torch.testing.assert_close(out.responsibilities.double(), responsibilities, rtol=0, atol=RELATIVE[dtype] / 8)
    assert torch.equal(out.logp, s)
    (gradient,) = torch.autograd.grad(out.loss, s, upstream.to(dtype))
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient.double(), -responsibilities * upstream, rtol=0, atol=RELATIVE[dtype])


@every_dtype
@every_alpha
@property_test
@given(s=log_likelihoods())
def test_responsibilities_sum_to_one_and_ess_is_their_inverse_square_sum(alpha, dtype, s):
    out = renyi_reduce(s.to(dtype), alpha)
    r, slack = out.responsibilities.double(), RELATIVE[dtype]
    torch.testing.assert_close(r.sum(dim=0), torch.ones(s.shape[1]).double(), rtol=0, atol=slack)
    torch.testing.assert_close(out.ess.double(), 1 / r.square().sum(dim=0), rtol=slack, atol=0)
    assert (out.ess >= 1 - slack).all()
    assert (out.ess <= s.shape[0] * (1 + slack)).all()


@every_path
@every_alpha
@pytest.mark.parametrize("K", [1, 3, 8])
def test_equal_particles_share_equally_and_lose_what_each_loses(reduce, K, alpha, backend, dtype):
    s = torch.tensor([-1e4, -3.3, 0.0], dtype=dtype).expand(K, 3)
    out = reduce(s, alpha, backend)
    assert torch.equal(out.responsibilities, torch.full((K, 3), 1 / K, dtype=dtype))
    torch.testing.assert_close(out.ess, torch.full((3,), float(K), dtype=dtype))
    torch.testing.assert_close(out.loss, -s[0], rtol=RELATIVE[dtype], atol=0)


@every_path
@pytest.mark.parametrize("alpha", [*ALPHAS, 1e-300, 1e300])
def test_one_particle_loses_its_own_nll_exactly_at_any_alpha(reduce, alpha, backend, dtype):
    s = torch.tensor([[-1e4, -0.1, 2.5, -math.inf]], dtype=dtype)
    out = reduce(s, alpha, backend)
    assert torch.equal(out.loss, -s[0])
    assert torch.equal(out.responsibilities, torch.ones_like(s))
    assert torch.equal(out.ess, torch.ones_like(s[0]))


@property_test
@given(s=log_likelihoods())
def test_alpha_zero_is_the_mean_nll(s):
    assert torch.equal(renyi_reduce(s, 0.0).loss, -s.mean(dim=0))
    assert torch.equal(renyi_reduce(s, 0).loss, -s.mean(dim=0))


@property_test
@given(s=log_likelihoods())
def test_alpha_one_is_the_nll_of_the_mixture(s):
    mixture = math.log(s.shape[0]) - s.logsumexp(dim=0)
    assert ((renyi_reduce(s, 1.0).loss - mixture).abs() <= 1e-14 * scale(s)).all()


@pytest.mark.parametrize("alpha", [1e-8, 1e-6, 1e-4])
@property_test
@given(s=log_likelihoods(spreads=[1e-3, 1.0, 30.0]))
def test_small_alpha_departs_from_the_mean_by_half_alpha_variance(alpha, s):
    # the remainder is alpha^2/6 of a third cumulant, which a spread d bounds by d^3 / (6 sqrt 3)
    spread = s.amax(dim=0) - s.amin(dim=0)
    expected = -s.mean(dim=0) - alpha / 2 * variance(s)
    slack = alpha**2 * spread**3 / 60 + 1e-14 * scale(s)
    assert ((renyi_reduce(s, alpha).loss - expected).abs() <= slack).all()


@every_path
def test_extreme_alphas_reach_the_mean_and_the_best_particle(reduce, backend, dtype):
    s = torch.tensor([[-3.0, -1e4], [-1.0, -2.0], [-1.0, -7.0]], dtype=dtype)
    lowest, highest = reduce(s, 1e-300, backend), reduce(s, 1e300, backend)
    torch.testing.assert_close(lowest.loss, -s.mean(dim=0), rtol=RELATIVE[dtype], atol=0)
    torch.testing.assert_close(lowest.responsibilities, torch.full_like(s, 1 / 3))
    assert torch.equal(highest.loss, -s.amax(dim=0))
    assert highest.responsibilities.tolist() == [[0, 0], [0.5, 1], [0.5, 0]]
    assert highest.ess.tolist() == [2, 1]


@every_path
@pytest.mark.parametrize("alpha", [5e-324, 1e-310, 5.5e-309, 1e-300, 1e-200, 1e200, 1e300, 1.7e308])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30], ids=str)
def test_no_alpha_is_too_extreme_for_the_gradient(reduce, gradient, alpha, backend, dtype, size):
    """1/alpha overflows below 5.6e-309, and on the way to the gradient it multiplies what comes from above."""
    s = torch.tensor([[-3.0, -1e4], [-1.0, -2.0], [-2.0, -7.0]], dtype=dtype)
    upstream = torch.tensor([1.0, -0.5], dtype=dtype) * size
    out = reduce(s, alpha, backend)
    loss = -s.mean(dim=0) if alpha < 1 else -s.amax(dim=0)
    r = torch.full_like(s, 1 / 3) if alpha < 1 else torch.tensor([[0, 0], [1, 1], [0, 0]], dtype=dtype)
    torch.testing.assert_close(out.loss, loss, rtol=RELATIVE[dtype], atol=0)
    torch.testing.assert_close(out.responsibilities, r, rtol=RELATIVE[dtype], atol=0)
    torch.testing.assert_close(gradient(s, alpha, upstream, backend), -r * upstream, rtol=RELATIVE[dtype], atol=0)


# identities and bounds of the paper


@every_dtype
@property_test
@given(s=log_likelihoods(), alphas=st.lists(st.floats(0.0, 5.0) | st.sampled_from(ALPHAS), min_size=2, max_size=2))
def test_loss_does_not_rise_with_alpha(dtype, s, alphas):
    s = s.to(dtype)
    lower, upper = (renyi_reduce(s, alpha).loss for alpha in sorted(alphas))
    assert (upper <= lower + RELATIVE[dtype] * scale(s)).all()


@every_dtype
@every_positive_alpha
@property_test
@given(s=log_likelihoods())
def test_shielding_bounds_a_responsibility_by_its_deficit(alpha, dtype, s):
    s = s.to(dtype)
    bound = torch.exp(-alpha * (s.amax(dim=0).double() - s.double()))
    r = renyi_reduce(s, alpha).responsibilities.double()
    assert (r <= bound * (1 + RELATIVE[dtype]) + torch.finfo(dtype).smallest_normal).all()


@every_dtype
@every_positive_alpha
@property_test
@given(s=log_likelihoods())
def test_loss_is_the_donsker_varadhan_trade_off_at_the_responsibilities(alpha, dtype, s):
    s = s.to(dtype)
    out = renyi_reduce(s, alpha)
    r = out.responsibilities.double()
    # KL(r || uniform), written so that a small one does not cancel away
    excess = s.shape[0] * r - 1
    kl = (torch.special.xlog1py(1 + excess, excess) - excess).mean(dim=0)
    trade_off = -(r * s.double()).sum(dim=0) + kl / alpha
    assert ((out.loss.double() - trade_off).abs() <= RELATIVE[dtype] * scale(s.double())).all()


@every_positive_alpha
@property_test
@given(s=log_likelihoods())
def test_gain_over_independent_training_is_at_least_the_variance_bound(alpha, s):
    # the bound does not change when s is shifted so that the largest p is 1
    p_alpha_less_one = torch.expm1(alpha * (s - s.amax(dim=0)))
    bound = variance(p_alpha_less_one) / (2 * alpha)
    gain = renyi_reduce(s, 0.0).loss - renyi_reduce(s, alpha).loss
    assert (gain >= bound * (1 - 1e-12) - 1e-14 * scale(s)).all()


@pytest.mark.parametrize("alpha", [0.3, 0.8, 3.0])
@property_test
@given(s=log_likelihoods())
def test_loss_is_the_mixture_nll_plus_a_renyi_entropy_of_the_responsibilities(alpha, s):
    out = renyi_reduce(s, alpha)
    density = s.shape[0] * out.responsibilities  # taken at the same alpha as the loss
    order = 1 / alpha
    entropy = density.pow(order).mean(dim=0).log() / (1 - order)
    expected = renyi_reduce(s, 1.0).loss + (1 - 1 / alpha) * entropy
    assert (entropy <= 1e-12).all()
    assert ((out.loss - expected).abs() <= 1e-12 * scale(s)).all()


@every_alpha
@property_test
@given(s=log_likelihoods(), shift=st.sampled_from([-1e4, 0.5, 1e4]))
def test_shifting_all_particles_shifts_the_loss_and_leaves_the_responsibilities(alpha, s, shift):
    out, shifted = renyi_reduce(s, alpha), renyi_reduce(s + shift, alpha)
    assert ((shifted.loss - (out.loss - shift)).abs() <= 1e-14 * (scale(s) + abs(shift))).all()
    torch.testing.assert_close(shifted.responsibilities, out.responsibilities, rtol=0, atol=1e-10)


@every_alpha
@property_test
@given(s=log_likelihoods(), seed=st.integers(0, 2**31))
def test_permuting_particles_permutes_results(alpha, s, seed):
    order = torch.randperm(s.shape[0], generator=torch.Generator().manual_seed(seed))
    out, permuted = renyi_reduce(s, alpha), renyi_reduce(s[order], alpha)
    torch.testing.assert_close(permuted.loss, out.loss, rtol=1e-12, atol=TINY)
    torch.testing.assert_close(permuted.responsibilities, out.responsibilities[order], rtol=0, atol=1e-12)
    torch.testing.assert_close(permuted.ess, out.ess, rtol=1e-12, atol=0)
    assert torch.equal(permuted.logp, s[order])
