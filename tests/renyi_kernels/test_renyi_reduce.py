"""The alpha-Renyi reduction. Layout: K particles, B sequences, T tokens; numbers are those of arXiv 2605.27747."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from renyi_kernels import RenyiOutput, renyi_reduce

from .marks import ALPHAS, every_alpha, fast_paths

POSITIVE_ALPHAS = ALPHAS[1:]
SPREADS = [0.0, 1e-3, 1.0, 30.0, 1e4]
DTYPES = [torch.float64, torch.float32]
RELATIVE = {torch.float64: 1e-12, torch.float32: 1e-6}
TINY = 1e-37  # below it fp32 is subnormal

property_test = settings(max_examples=25, deadline=None, derandomize=True)
every_positive_alpha = pytest.mark.parametrize("alpha", POSITIVE_ALPHAS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# the kernels take no fp64, and work in it inside
every_path = pytest.mark.parametrize(
    ("backend", "dtype"), [*(("torch", dtype) for dtype in DTYPES), ("triton", torch.float32)], ids=str
)


@pytest.fixture(scope="session")
def reduce(device_of):
    """reduce(s, alpha, backend, mask=None): the op run where that path runs, its results on the CPU."""

    def run(s, alpha, backend, mask=None):
        on = device_of(backend)
        out = renyi_reduce(s.to(on), alpha, mask=None if mask is None else mask.to(on), backend=backend)
        return RenyiOutput(*(x.cpu() for x in out))

    return run


@pytest.fixture(scope="session")
def gradient(reduce):
    """gradient(s, alpha, upstream, backend="torch", mask=None): of the loss, for an upstream gradient [B]."""

    def run(s, alpha, upstream, backend="torch", mask=None):
        s = s.detach().requires_grad_()
        loss = reduce(s, alpha, backend, mask).loss
        return torch.autograd.grad(loss, s, upstream.to(loss.dtype))[0]

    return run


@st.composite
def log_likelihoods(draw, min_particles=1, spreads=SPREADS):
    """[K, B] fp64, none above 0, so that a loss is a sum of terms of one sign and a relative error means something."""
    K, B = draw(st.integers(min_particles, 9)), draw(st.integers(0, 5))
    unit = st.floats(0.0, 1.0, allow_subnormal=False) | st.sampled_from([0.0, 0.5, 1.0])
    units = draw(st.lists(unit, min_size=K * B, max_size=K * B))
    offset = draw(st.sampled_from([0.0, 3.7, 1e4]))
    return -(offset + draw(st.sampled_from(spreads)) * torch.tensor(units, dtype=torch.float64).view(K, B))


def oracle(s, alpha):
    """(loss [B], responsibilities [K, B]) straight from the definitions, in 60 digits."""
    losses, columns = [], []
    with mpmath.workdps(60):
        for column in s.double().T.tolist():
            masses = [mpmath.exp(mpmath.mpf(alpha) * mpmath.mpf(x)) for x in column]
            total = mpmath.fsum(masses)
            if alpha == 0.0:
                losses.append(float(-mpmath.fsum(map(mpmath.mpf, column)) / len(column)))
            else:
                losses.append(float(-mpmath.log(total / len(column)) / mpmath.mpf(alpha)))
            columns.append([float(mass / total) for mass in masses])
    K, B = s.shape
    return torch.tensor(losses, dtype=torch.float64), torch.tensor(columns, dtype=torch.float64).view(B, K).T


def scale(s):
    """[B]: the magnitude that rounding errors of a column go with."""
    return s.abs().amax(dim=0).clamp(min=1.0)


def variance(x):
    return (x - x.mean(dim=0)).square().mean(dim=0)


# values


@every_path
@pytest.mark.parametrize("alpha", [*ALPHAS, 1e-12])
@property_test
@given(s=log_likelihoods())
def test_loss_and_responsibilities_equal_the_definitions_in_60_digits(reduce, alpha, backend, dtype, s):
    s = s.to(dtype)
    loss, responsibilities = oracle(s, alpha)
    out = reduce(s, alpha, backend)
    assert out.loss.dtype == out.responsibilities.dtype == out.ess.dtype == out.logp.dtype == dtype
    torch.testing.assert_close(out.loss.double(), loss, rtol=RELATIVE[dtype], atol=TINY)
    torch.testing.assert_close(out.responsibilities.double(), responsibilities, rtol=0, atol=RELATIVE[dtype] / 8)
    assert torch.equal(out.logp, s)


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


# gradients


@every_path
@every_alpha
@property_test
@given(s=log_likelihoods())
def test_gradient_is_minus_responsibility_times_an_uneven_upstream(uneven, gradient, alpha, backend, dtype, s):
    s, upstream = s.to(dtype), uneven(s.shape[1:])
    grad = gradient(s, alpha, upstream, backend)
    assert grad.dtype == dtype
    torch.testing.assert_close(grad.double(), -oracle(s, alpha)[1] * upstream, rtol=0, atol=RELATIVE[dtype])


@every_alpha
def test_first_and_second_derivatives_agree_with_finite_differences(normals, alpha):
    s = (1.5 * normals(0)(4, 3) - 2.0).requires_grad_()
    loss = lambda s: renyi_reduce(s, alpha).loss
    assert gradcheck(loss, s)
    assert gradgradcheck(loss, s)


@pytest.mark.parametrize("alpha", [0.3, 1.0, 3.0])
def test_hessian_is_minus_alpha_times_the_covariance_of_the_routing(normals, alpha):
    s = 2.0 * normals(1)(5)
    hessian = torch.autograd.functional.hessian(lambda s: renyi_reduce(s[:, None], alpha).loss.sum(), s)
    r = torch.softmax(alpha * s, dim=0)
    torch.testing.assert_close(hessian, -alpha * (r.diag() - r.outer(r)), rtol=1e-10, atol=1e-12)


@every_alpha
def test_only_the_loss_carries_a_gradient(alpha):
    out = renyi_reduce(torch.zeros(2, 3, requires_grad=True), alpha)
    assert isinstance(out, RenyiOutput)
    assert [field for field in out._fields if getattr(out, field).requires_grad] == ["loss"]


# zero mass


@every_path
@every_alpha
@pytest.mark.parametrize("K", [1, 4])
def test_an_example_without_mass_loses_inf_routes_evenly_and_has_zero_gradient(
    normals, reduce, gradient, K, alpha, backend, dtype
):
    s = normals(2)(K, 3).to(dtype)
    without = s.clone()
    without[:, 1] = -math.inf
    s_kept, kept = s[:, [0, 2]], [0, 2]
    upstream = torch.tensor([0.5, -2.0, 3.0], dtype=dtype)
    out, others = reduce(without, alpha, backend), reduce(s_kept, alpha, backend)
    assert out.loss[1] == math.inf
    assert torch.equal(out.responsibilities[:, 1], torch.full((K,), 1 / K, dtype=dtype))
    assert out.ess[1] == K
    for ours, theirs in zip(out, others, strict=True):
        assert torch.equal(ours[..., kept], theirs)
    grad = gradient(without, alpha, upstream, backend)
    assert torch.equal(grad[:, 1], torch.zeros(K, dtype=dtype))
    assert torch.equal(grad[:, kept], gradient(s_kept, alpha, upstream[kept], backend))


@every_positive_alpha
def test_an_example_without_mass_has_zero_second_derivative(alpha):
    s = torch.tensor([[-1.0, -math.inf], [-2.0, -math.inf]], dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(renyi_reduce(s, alpha).loss.sum(), s, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), s)
    assert torch.equal(second[:, 1], torch.zeros(2, dtype=torch.float64))
    assert second[:, 0].isfinite().all()


@every_path
@every_positive_alpha
def test_particles_without_mass_are_left_out_of_the_routing(normals, reduce, gradient, alpha, backend, dtype):
    K, dead = 5, torch.tensor([True, False, True, False, False])
    s = normals(3)(K, 2).to(dtype)
    s[dead, 0] = -math.inf
    out, rest = reduce(s, alpha, backend), reduce(s[~dead, :1], alpha, backend)
    torch.testing.assert_close(out.loss[:1], rest.loss + math.log(5 / 3) / alpha, rtol=2 * RELATIVE[dtype], atol=0)
    assert torch.equal(out.responsibilities[dead, 0], torch.zeros(2, dtype=dtype))
    torch.testing.assert_close(out.responsibilities[~dead, :1], rest.responsibilities)
    upstream = torch.tensor([-1.5, 0.5], dtype=dtype)
    torch.testing.assert_close(gradient(s, alpha, upstream, backend), -out.responsibilities * upstream)


@fast_paths
def test_at_alpha_zero_one_particle_without_mass_makes_the_mean_infinite(reduce, gradient, backend):
    s = torch.tensor([[-math.inf, -1.0], [-1.0, -3.0]])
    out = reduce(s, 0.0, backend)
    assert out.loss.tolist() == [math.inf, 2.0]
    assert torch.equal(out.responsibilities, torch.full((2, 2), 0.5))
    assert gradient(s, 0.0, torch.ones(2), backend).tolist() == [[-0.5, -0.5], [-0.5, -0.5]]


@every_alpha
@fast_paths
def test_nan_shows_in_its_own_example_and_nowhere_else(normals, reduce, alpha, backend):
    clean = normals(4)(3, 3).float()
    s = clean.clone()
    s[1, 1] = math.nan
    out, expected = reduce(s, alpha, backend), reduce(clean, alpha, backend)
    assert out.loss[1].isnan()
    for ours, theirs in zip(out, expected, strict=True):
        assert torch.equal(ours[..., [0, 2]], theirs[..., [0, 2]])


# tokens


@pytest.mark.parametrize(
    ("backend", "dtype", "alpha"),
    [
        *(("torch", dtype, alpha) for dtype in DTYPES for alpha in ALPHAS),
        ("triton", torch.float32, 0.0),
        ("triton", torch.float32, 0.8),
    ],
    ids=str,
)
@property_test
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(0, 3), st.integers(0, 5)),
    seed=st.integers(0, 2**31),
    junk=st.sampled_from([math.nan, -math.inf, math.inf]),
)
def test_tokens_reduce_as_their_masked_sums_whatever_stands_under_the_mask(
    normals, uneven, reduce, gradient, alpha, backend, dtype, shape, seed, junk
):
    draw, upstream = normals(seed), uneven(shape[1:2]).to(dtype)
    tokens, mask = -draw(*shape).abs().to(dtype), draw(*shape[1:]) > -0.3
    sums = (tokens.double() * mask).sum(dim=-1)
    tokens = torch.where(mask, tokens, junk)
    out = reduce(tokens, alpha, backend, mask)
    torch.testing.assert_close(out.logp.double(), sums, rtol=RELATIVE[dtype], atol=0)
    for ours, theirs in zip(out, reduce(out.logp, alpha, backend), strict=True):
        assert torch.equal(ours, theirs)
    expected = gradient(out.logp, alpha, upstream, backend)[..., None] * mask
    assert torch.equal(gradient(tokens, alpha, upstream, backend, mask), expected)


@every_alpha
@every_path
def test_a_fully_masked_example_has_log_likelihood_zero_and_no_token_gradient(
    normals, reduce, gradient, alpha, backend, dtype
):
    tokens, mask = normals(5)(3, 2, 4).to(dtype), torch.tensor([[True] * 4, [False] * 4])
    tokens[:, 1] = math.nan
    out = reduce(tokens, alpha, backend, mask)
    assert torch.equal(out.logp[:, 1], torch.zeros(3, dtype=dtype))
    assert out.loss[1] == 0
    assert torch.equal(out.responsibilities[:, 1], torch.full((3,), 1 / 3, dtype=dtype))
    grad = gradient(tokens, alpha, torch.tensor([1.0, 2.0]), backend, mask)
    assert torch.equal(grad[:, 1], torch.zeros(3, 4, dtype=dtype))


@fast_paths
def test_without_a_mask_every_token_counts(normals, reduce, backend):
    tokens = normals(6)(3, 2, 4).float()
    everything = torch.ones(2, 4, dtype=torch.bool)
    for ours, theirs in zip(reduce(tokens, 0.8, backend), reduce(tokens, 0.8, backend, everything), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(reduce(tokens[..., :1], 0.8, backend).loss, reduce(tokens[..., 0], 0.8, backend).loss)


MASK_DTYPES = [torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64, torch.float16, torch.float32]


@pytest.mark.parametrize("mask_dtype", MASK_DTYPES, ids=str)
@pytest.mark.parametrize("part", ["all", "slice", "steps", "transposed"])
@fast_paths
def test_a_mask_of_zeros_and_ones_is_a_boolean_one(normals, reduce, gradient, uneven, backend, mask_dtype, part):
    """Also where it is a part of a wider one: its conversion to a boolean lies in memory in another way than it did."""
    tokens, mask = normals(7)(3, 2, 4).float(), torch.tensor([[1, 1, 0, 1], [0, 1, 0, 0]])
    wide = (1 - mask).repeat_interleave(3, dim=1).to(mask_dtype)  # where the mask does not lie stands its opposite
    if part == "transposed":
        wide = wide.T.contiguous().T
    given_ = mask.to(mask_dtype) if part == "all" else (wide[:, 2:6] if part == "slice" else wide[:, 1::3]).copy_(mask)
    assert given_.is_contiguous() == (part == "all")
    expected = reduce(tokens, 0.8, backend, mask.bool())
    assert torch.equal(reduce(tokens, 0.8, backend, given_).loss, expected.loss)
    expected = gradient(tokens, 0.8, uneven((2,)), backend, mask.bool())
    assert torch.equal(gradient(tokens, 0.8, uneven((2,)), backend, given_), expected)


@every_alpha
@fast_paths
def test_no_examples_give_empty_results_and_gradient(reduce, alpha, backend):
    for shape in ((3, 0), (3, 0, 5)):
        s = torch.zeros(shape, requires_grad=True)
        out = reduce(s, alpha, backend)
        assert [tuple(x.shape) for x in out] == [(0,), (3, 0), (0,), (3, 0)]
        out.loss.sum().backward()
        assert s.grad.shape == shape


# backends, dtypes and layouts


@fast_paths
def test_no_tokens_are_a_certain_outcome(reduce, gradient, backend):
    tokens = torch.zeros(3, 2, 0)
    out = reduce(tokens, 0.8, backend)
    assert not out.logp.any()
    assert torch.equal(out.loss, torch.zeros(2))
    assert gradient(tokens, 0.8, torch.ones(2), backend).shape == (3, 2, 0)


def test_sums_longer_than_a_tile_of_the_kernel_are_right(normals, uneven, reduce, gradient):
    tokens, mask = (
        -normals(16)(300, 2, 40).abs().float(),
        normals(17)(2, 40) > 0,
    )  # 16 tokens of 300 particles at a time
    gold = reduce(tokens.double(), 0.01, "reference", mask)
    out = reduce(tokens, 0.01, "triton", mask)
    torch.testing.assert_close(out.logp.double(), gold.logp, rtol=1e-6, atol=0)
    torch.testing.assert_close(out.loss.double(), gold.loss, rtol=1e-6, atol=0)
    grad = gradient(tokens, 0.01, uneven((2,)), "triton", mask)
    expected = gradient(tokens.double(), 0.01, uneven((2,)), "reference", mask)
    torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=1e-8)


@every_alpha
def test_torch_and_reference_paths_agree_bitwise(normals, uneven, gradient, alpha):
    s, upstream = normals(14)(4, 3).float(), uneven((3,))
    outs = [renyi_reduce(s, alpha, backend=backend) for backend in ("torch", "reference")]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*outs, strict=True))
    grads = [gradient(s, alpha, upstream, backend) for backend in ("torch", "reference")]
    assert torch.equal(*grads)


@every_alpha
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@fast_paths
def test_low_precision_input_gives_what_its_fp32_copy_gives(normals, reduce, gradient, alpha, dtype, backend):
    s = (3 * normals(8)(4, 3)).to(dtype)
    out = reduce(s, alpha, backend)
    assert all(field.dtype == torch.float32 for field in out)
    for ours, theirs in zip(out, reduce(s.float(), alpha, backend), strict=True):
        assert torch.equal(ours, theirs)
    upstream = torch.tensor([1.0, -2.0, 0.5])
    grad = gradient(s, alpha, upstream, backend)
    torch.testing.assert_close(grad, (-out.responsibilities * upstream).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@fast_paths
def test_low_precision_tokens_are_summed_in_fp32(normals, reduce, dtype, backend):
    tokens = -normals(9)(2, 3, 700).abs().to(dtype)
    logp = reduce(tokens, 0.8, backend).logp
    torch.testing.assert_close(logp.double(), tokens.double().sum(dim=-1), rtol=1e-6, atol=0)


@every_alpha
@every_path
def test_strided_input_equals_contiguous(device_of, normals, uneven, gradient, alpha, backend, dtype):
    slack = {"rtol": RELATIVE[dtype], "atol": RELATIVE[dtype]}
    on, upstream = device_of(backend), uneven((3,))  # as the loss that `gradient` differentiates, on the CPU
    draw = lambda *shape: normals(10)(*shape).to(on, dtype)
    for strided in (draw(3, 4).T, draw(8, 6)[::2, 1::2], draw(4, 1).expand(4, 3)):
        assert not strided.is_contiguous()
        contiguous = strided.contiguous()
        out, expected = (renyi_reduce(s, alpha, backend=backend) for s in (strided, contiguous))
        for ours, theirs in zip(out, expected, strict=True):
            torch.testing.assert_close(ours, theirs, **slack)
        grad = gradient(strided, alpha, upstream, backend)
        torch.testing.assert_close(grad, gradient(contiguous, alpha, upstream, backend), **slack)


@every_path
def test_strided_tokens_mask_and_upstream_equal_contiguous_ones(device_of, normals, uneven, backend, dtype):
    slack = {"rtol": RELATIVE[dtype], "atol": RELATIVE[dtype]}
    on = device_of(backend)
    tokens, mask = normals(11)(4, 3, 2).to(on, dtype).permute(2, 1, 0), (normals(12)(4, 3) > 0).to(on).T
    upstream = uneven((6,)).to(on, dtype)[::2]
    assert not any(x.is_contiguous() for x in (tokens, mask, upstream))

    def run(tokens, mask, upstream):
        tokens = tokens.detach().requires_grad_()
        out = renyi_reduce(tokens, 0.8, mask=mask, backend=backend)
        return [*out, *torch.autograd.grad(out.loss, tokens, upstream)]

    expected = run(tokens.contiguous(), mask.contiguous(), upstream.contiguous())
    for strided in ((tokens, mask, upstream), (tokens, mask.long(), upstream)):
        for ours, theirs in zip(run(*strided), expected, strict=True):
            torch.testing.assert_close(ours, theirs, **slack)


@fast_paths
def test_two_runs_are_bitwise_equal_and_leave_the_input_alone(device_of, normals, backend):
    on = device_of(backend)
    tokens, mask = normals(13)(4, 3, 50).to(on, torch.float32), (normals(15)(3, 50) > 0).to(on)
    before = tokens.clone(), mask.clone()
    runs = [renyi_reduce(tokens, 0.8, mask=mask, backend=backend) for _ in range(2)]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*runs, strict=True))
    assert torch.equal(tokens, before[0])
    assert torch.equal(mask, before[1])


def test_the_kernels_refuse_a_second_derivative(reduce):
    s = torch.tensor([[-1.0, -2.0], [-3.0, -1.5]], requires_grad=True)
    (grad,) = torch.autograd.grad(reduce(s, 0.8, "triton").loss.sum(), s, create_graph=True)
    with pytest.raises(RuntimeError, match=r"renyi_reduce.*second derivative.*backend='reference'"):
        grad.square().sum().backward()


@every_alpha
def test_only_the_loss_of_the_kernels_carries_a_gradient(reduce, alpha):
    out = reduce(torch.zeros(2, 3, requires_grad=True), alpha, "triton")
    assert [field for field in out._fields if getattr(out, field).requires_grad] == ["loss"]


@property_test
@given(s=log_likelihoods(), seed=st.integers(0, 2**31))
def test_permuting_particles_permutes_what_the_kernels_give(reduce, s, seed):
    order = torch.randperm(s.shape[0], generator=torch.Generator().manual_seed(seed))
    out, permuted = (reduce(x.float(), 0.8, "triton") for x in (s, s[order]))
    torch.testing.assert_close(permuted.loss, out.loss, rtol=1e-6, atol=TINY)
    torch.testing.assert_close(permuted.responsibilities, out.responsibilities[order], rtol=0, atol=1e-6)
    assert torch.equal(permuted.logp, out.logp[order])


# errors


@pytest.mark.parametrize("alpha", [-1e-9, -1.0, math.nan, math.inf, -math.inf])
def test_alpha_out_of_range_is_a_value_error(alpha):
    with pytest.raises(ValueError, match="alpha"):
        renyi_reduce(torch.zeros(2, 3), alpha)


@pytest.mark.parametrize("alpha", [True, "0.5", None, 1j, torch.tensor(0.5)], ids=repr)
def test_alpha_that_is_no_number_is_a_type_error(alpha):
    with pytest.raises(TypeError, match="alpha"):
        renyi_reduce(torch.zeros(2, 3), alpha)


@pytest.mark.parametrize("shape", [(), (3,), (1, 2, 3, 4), (0, 3), (0, 3, 2)], ids=str)
def test_logp_of_another_shape_is_a_value_error(shape):
    with pytest.raises(ValueError, match="logp"):
        renyi_reduce(torch.zeros(shape), 0.5)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool], ids=str)
def test_logp_that_is_not_floating_point_is_a_type_error(dtype):
    with pytest.raises(TypeError, match="logp"):
        renyi_reduce(torch.zeros(2, 3, dtype=dtype), 0.5)


@pytest.mark.parametrize(
    ("shape", "mask_shape"), [((2, 3), (2, 3)), ((2, 3), (3,)), ((2, 3, 4), (3,)), ((2, 3, 4), (2, 3, 4))], ids=str
)
def test_a_mask_that_does_not_fit_is_a_value_error(shape, mask_shape):
    with pytest.raises(ValueError, match="mask"):
        renyi_reduce(torch.zeros(shape), 0.5, mask=torch.ones(mask_shape, dtype=torch.bool))
