"""Weights of the particles: values, gradients and identities with w_k in the place of 1/K, and what is refused.

Layout: K particles, B sequences, T tokens, D hidden size, V vocabulary; numbers are those of arXiv 2605.27747.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch._subclasses import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck

from renyi_kernels import linear_logprob, reference, renyi_loss, renyi_reduce

from ..marks import every_alpha, every_backend, fast_paths, fp64_paths
from .definitions import RELATIVE, TINY, every_path, every_positive_alpha, mixtures, oracle, property_test, variance

few_runs = settings(property_test, max_examples=12)
WEIGHTS = torch.tensor([0.2, 0.5, 0.0, 0.3], dtype=torch.float64)
BEST_IS_FAINT = torch.tensor([1e-30, 0.6, 0.4], dtype=torch.float64)


def slack(loss, s):
    """What rounding in fp64 may do to an identity."""
    return 1e-13 * torch.maximum(s.abs().amax(dim=0), loss.abs()).clamp(min=1.0)


# values and gradients


@every_path
@pytest.mark.parametrize("alpha", [0.0, 1e-8, 0.8, 50.0])
@few_runs
@given(mixture=mixtures())
def test_loss_responsibilities_and_gradient_equal_the_definitions_in_60_digits(
    reduce, uneven, alpha, backend, dtype, mixture
):
    s, weights = mixture
    s, upstream = s.to(dtype).requires_grad_(), uneven(s.shape[1:])
    loss, responsibilities = oracle(s, alpha, weights)
    out = reduce(s, alpha, backend, weights=weights)
    torch.testing.assert_close(out.loss.double(), loss, rtol=RELATIVE[dtype], atol=TINY)
    torch.testing.assert_close(out.responsibilities.double(), responsibilities, rtol=0, atol=RELATIVE[dtype] / 8)
    torch.testing.assert_close(out.ess.double(), 1 / responsibilities.square().sum(dim=0), rtol=RELATIVE[dtype], atol=0)
    (gradient,) = torch.autograd.grad(out.loss, s, upstream.to(dtype))
    torch.testing.assert_close(gradient.double(), -responsibilities * upstream, rtol=0, atol=RELATIVE[dtype])


@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("K", "alpha"), [(1, 0.8), (3, 0.0), (7, 0.8), (10, 1e-8), (10, 30.0)])
@every_path
def test_equal_weights_give_the_bits_of_none(
    normals, uneven, reduce, gradient, backend, dtype, K, alpha, weights_dtype
):
    s, upstream, weights = -30 * normals(0)(K, 4).abs().to(dtype), uneven((4,)), torch.full((K,), 1 / K)
    s[0, 1], s[:, 2], weights = -math.inf, -math.inf, weights.to(weights_dtype)
    for ours, theirs in zip(reduce(s, alpha, backend, weights=weights), reduce(s, alpha, backend), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(gradient(s, alpha, upstream, backend, weights=weights), gradient(s, alpha, upstream, backend))


@every_alpha
def test_derivatives_of_both_orders_and_modes_agree_with_finite_differences(normals, alpha):
    for weights in (WEIGHTS[[0, 1, 3]], WEIGHTS[[0, 2, 1, 3]], BEST_IS_FAINT):
        s = 1.5 * normals(1)(len(weights), 3) - 2.0
        s[0, 0] = 3.0  # alone in explaining the first example
        s.requires_grad_()
        loss = lambda s, w=weights: renyi_reduce(s, alpha, weights=w).loss
        assert gradcheck(loss, s, check_forward_ad=True)
        assert gradgradcheck(loss, s)
    batch = torch.stack([s.detach(), s.detach() - 1])
    assert torch.equal(torch.func.vmap(loss)(batch), torch.stack([loss(x) for x in batch]))
    of_two = torch.stack([weights, weights.flip(0)])
    pairs = zip(batch, of_two, strict=True)
    assert torch.equal(torch.func.vmap(loss)(batch, of_two), torch.stack([loss(x, w) for x, w in pairs]))


@every_alpha
def test_the_reference_is_differentiable_in_weights_above_zero(normals, alpha):
    s = 1.5 * normals(2)(4, 3) - 2.0
    s[0, 0] = 40.0
    logits = torch.tensor([-50.0, 0.3, -0.4, 0.8], dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda logits: reference.renyi_reduce(s, alpha, torch.softmax(logits, dim=0))[0], logits)


# what does not count


@pytest.mark.parametrize("junk", [math.nan, -math.inf, math.inf, 1e30])
@pytest.mark.parametrize("alpha", [0.0, 0.8])
@every_path
def test_a_particle_of_weight_zero_is_as_if_it_were_not_there(
    normals, uneven, reduce, gradient, alpha, backend, dtype, junk
):
    s, upstream, others = normals(3)(4, 3).to(dtype), uneven((3,)), [0, 1, 3]
    s[2] = junk
    out, rest = (reduce(x, alpha, backend, weights=w) for x, w in ((s, WEIGHTS), (s[others], WEIGHTS[others])))
    close = {"rtol": RELATIVE[dtype], "atol": RELATIVE[dtype]}
    torch.testing.assert_close(out.loss, rest.loss, **close)
    torch.testing.assert_close(out.ess, rest.ess, **close)
    torch.testing.assert_close(out.responsibilities[others], rest.responsibilities, **close)
    assert not out.responsibilities[2].any()
    grad = gradient(s, alpha, upstream, backend, weights=WEIGHTS)
    assert not grad[2].any()
    torch.testing.assert_close(grad, -out.responsibilities * upstream.to(dtype), **close)


@every_backend
@every_alpha
def test_an_example_that_no_particle_with_a_weight_allows_loses_inf_has_the_weights_and_no_gradient(
    reduce, gradient, alpha, backend
):
    s = torch.tensor([[-math.inf, -1.0], [-math.inf, -2.0], [-1.0, -3.0], [-math.inf, -4.0]])
    out = reduce(s, alpha, backend, weights=WEIGHTS)
    assert out.loss.isposinf().tolist() == [True, False]
    torch.testing.assert_close(out.responsibilities[:, 0], WEIGHTS.float())
    torch.testing.assert_close(out.ess[0], 1 / WEIGHTS.square().sum().float())
    found = gradient(s, alpha, torch.tensor([2.0, 1.0]), backend, weights=WEIGHTS)
    assert not found[:, 0].any()
    torch.testing.assert_close(found[:, 1], -out.responsibilities[:, 1])


@every_backend
def test_at_alpha_zero_a_particle_with_a_weight_and_without_mass_makes_the_mean_infinite(reduce, gradient, backend):
    s = torch.tensor([[-math.inf, -1.0], [-1.0, -math.inf], [-2.0, -2.0]])
    weights = torch.tensor([0.25, 0.0, 0.75])
    out = reduce(s, 0.0, backend, weights=weights)
    assert out.loss.tolist() == [math.inf, 1.75]
    assert gradient(s, 0.0, torch.ones(2), backend, weights=weights).tolist() == [[-0.25] * 2, [0, 0], [-0.75] * 2]


@every_path
def test_tokens_reduce_as_their_masked_sums(normals, uneven, reduce, gradient, backend, dtype):
    tokens, mask, upstream = -normals(4)(4, 3, 5).abs().to(dtype), normals(5)(3, 5) > -0.3, uneven((3,))
    tokens = torch.where(mask, tokens, math.nan)
    tokens[2] = math.nan
    out = reduce(tokens, 0.8, backend, mask, WEIGHTS)
    for ours, theirs in zip(out, reduce(out.logp, 0.8, backend, weights=WEIGHTS), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    expected = gradient(out.logp, 0.8, upstream, backend, weights=WEIGHTS)[..., None] * mask
    assert torch.equal(gradient(tokens, 0.8, upstream, backend, mask, WEIGHTS), expected)


# identities and bounds of the paper, with w_k in the place of 1/K


@property_test
@given(mixture=mixtures())
def test_alpha_zero_is_the_weighted_mean_and_alpha_one_the_nll_of_the_weighted_mixture(mixture):
    s, weights = mixture
    mean, mixed = -(weights @ s), -torch.logsumexp(s + weights.log()[:, None], dim=0)
    for alpha, expected in ((0.0, mean), (1.0, mixed)):
        loss = renyi_reduce(s, alpha, weights=weights).loss
        assert ((loss - expected).abs() <= slack(loss, s)).all()


@property_test
@given(mixture=mixtures(), alphas=st.lists(st.floats(0.0, 5.0), min_size=2, max_size=2))
def test_loss_does_not_rise_with_alpha(mixture, alphas):
    s, weights = mixture
    lower, upper = (renyi_reduce(s, alpha, weights=weights).loss for alpha in sorted(alphas))
    assert (upper <= lower + slack(lower, s)).all()


@every_positive_alpha
@property_test
@given(mixture=mixtures())
def test_shielding_bounds_a_responsibility_by_that_of_every_other_particle(alpha, mixture):
    s, weights = mixture
    r = renyi_reduce(s, alpha, weights=weights).responsibilities
    for j in weights.nonzero().flatten().tolist():
        bound = torch.exp((weights / weights[j]).log()[:, None] - alpha * (s[j] - s))
        assert (r <= bound * (1 + 1e-12) + torch.finfo(torch.float64).smallest_normal).all()


@every_positive_alpha
@property_test
@given(mixture=mixtures())
def test_loss_is_the_donsker_varadhan_trade_off_with_the_divergence_from_the_weights(alpha, mixture):
    s, weights = mixture
    s, weights = s[weights > 0], weights[weights > 0]
    out = renyi_reduce(s, alpha, weights=weights)
    # KL(r || w), written so that a small one does not cancel away
    excess = torch.expm1(alpha * (s + out.loss))  # r / w - 1
    torch.testing.assert_close(out.responsibilities, weights[:, None] * (1 + excess), rtol=1e-9, atol=1e-12)
    kl = weights @ (torch.special.xlog1py(1 + excess, excess) - excess)
    trade_off = -(out.responsibilities * s).sum(dim=0) + kl / alpha
    assert ((out.loss - trade_off).abs() <= 10 * slack(out.loss, s)).all()


@every_positive_alpha
@property_test
@given(mixture=mixtures())
def test_gain_over_independent_training_is_at_least_the_weighted_variance_bound(alpha, mixture):
    s, weights = mixture
    s, weights = s[weights > 0], weights[weights > 0]
    bound = variance(torch.expm1(alpha * (s - s.amax(dim=0))), weights) / (2 * alpha)
    independent = renyi_reduce(s, 0.0, weights=weights).loss
    gain = independent - renyi_reduce(s, alpha, weights=weights).loss
    assert (gain >= bound * (1 - 1e-12) - slack(independent, s)).all()


@pytest.mark.parametrize("alpha", [0.3, 0.8, 3.0])
@property_test
@given(mixture=mixtures())
def test_loss_is_the_mixture_nll_plus_a_renyi_entropy_of_the_responsibilities_against_the_weights(alpha, mixture):
    s, weights = mixture
    s, weights = s[weights > 0], weights[weights > 0][:, None]
    out = renyi_reduce(s, alpha, weights=weights[:, 0])
    log_density = alpha * (s - s.amax(dim=0))
    log_density = log_density - torch.logsumexp(log_density + weights.log(), dim=0)  # of r, with respect to w
    torch.testing.assert_close(weights * log_density.exp(), out.responsibilities, rtol=0, atol=1e-12)
    order = 1 / alpha
    entropy = torch.logsumexp(order * log_density + weights.log(), dim=0) / (1 - order)
    expected = renyi_reduce(s, 1.0, weights=weights[:, 0]).loss + (1 - 1 / alpha) * entropy
    assert (entropy <= 1e-11).all()
    assert ((out.loss - expected).abs() <= 10 * slack(out.loss, s)).all()


@every_path
@few_runs
@given(mixture=mixtures(), seed=st.integers(0, 2**31))
def test_permuting_particles_with_their_weights_permutes_results(reduce, backend, dtype, mixture, seed):
    s, weights = mixture
    order = torch.randperm(len(s), generator=torch.Generator().manual_seed(seed))
    out, permuted = (
        reduce(x.to(dtype), 0.8, backend, weights=w) for x, w in ((s, weights), (s[order], weights[order]))
    )
    torch.testing.assert_close(permuted.loss, out.loss, rtol=RELATIVE[dtype], atol=TINY)
    torch.testing.assert_close(permuted.responsibilities, out.responsibilities[order], rtol=0, atol=RELATIVE[dtype])
    torch.testing.assert_close(permuted.ess, out.ess, rtol=RELATIVE[dtype], atol=0)


# nothing asks for the values


IMPROPER = [[0.5, 0.6], [1.5, -0.5], [math.nan, 1.0], [math.inf, 0.0], [0.0, 0.0], [0.5, 0.5 - 2e-6]]


@pytest.mark.parametrize("weights", IMPROPER, ids=str)
@pytest.mark.parametrize("alpha", [0.0, 0.8])
@fast_paths
def test_weights_that_are_no_distribution_make_the_whole_loss_nan_where_nobody_may_ask(
    device_of, alpha, backend, weights
):
    """What is called here is what the op calls after the checks, which do not look at the values on a GPU."""
    s = torch.tensor([[-1.0, -math.inf, -math.inf], [-2.0, -math.inf, -3.0]], device=device_of(backend))
    weights, alpha = (torch.tensor(x, dtype=torch.float64, device=s.device) for x in (weights, alpha))
    if backend == "triton":
        relative = reference.relative_weights(weights)
        out = torch.ops.renyi_kernels.renyi_reduce(s[..., None], None, alpha, relative)[:3]
    else:
        out = reference.renyi_reduce(s, alpha, weights)
    assert all(x.isnan().all() for x in out)


@fp64_paths
@every_alpha
def test_fake_tensors_which_have_no_values_are_enough(backend, alpha):
    held = torch.full((3,), 1 / 3)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for weights in (torch.full((3,), 1 / 3), held):
            tokens = torch.zeros(3, 4, 5, requires_grad=True)
            mask = torch.ones(4, 5, dtype=torch.bool)
            out = renyi_reduce(tokens, alpha, mask=mask, weights=weights, backend=backend)
            out.loss.sum().backward()
            assert [x.shape for x in out] == [(4,), (3, 4), (4,), (3, 4)]
            assert tokens.grad.shape == tokens.shape


@fast_paths
def test_one_compiled_graph_serves_all_weights_that_are_written_into_one_tensor(device_of, normals, backend):
    """As a captured graph is replayed."""
    s = -normals(6)(3, 4).abs().float().to(device_of(backend))
    held = torch.zeros(3, dtype=torch.float64, device=s.device)
    torch._dynamo.reset()
    run = torch.compile(
        lambda: renyi_reduce(s, 0.8, weights=held, backend=backend).loss, fullgraph=True, backend="aot_eager"
    )
    assert run().isnan().all()  # compiled code does not look
    with torch.compiler.set_stance("fail_on_recompile"):
        for weights in ([0.2, 0.3, 0.5], [0.0, 1.0, 0.0], [1e-30, 0.5, 0.5], [0.2, 0.3, 0.6]):
            held.copy_(torch.tensor(weights))
            expected = reference.renyi_reduce(s, 0.8, held)[0]
            torch.testing.assert_close(run(), expected, rtol=1e-6, atol=0, equal_nan=True)
    torch._dynamo.reset()


# the fused loss


@pytest.fixture
def problem(normals):
    """(hidden [K, B, T, D], weight [V, D], labels [B, T])"""
    draw = normals(7)
    return draw(4, 2, 3, 5), draw(7, 5), torch.tensor([[1, 6, -100], [0, -100, 3]])


def test_the_fused_loss_takes_weights(problem, value_and_grads, uneven):
    hidden, weight, labels = problem
    fused = lambda hidden: renyi_loss(hidden, weight, labels, 0.8, weights=WEIGHTS).loss

    def parts(hidden):
        token_logp = linear_logprob(hidden, weight, labels.expand(4, 2, 3), backend="reference")
        return renyi_reduce(token_logp, 0.8, mask=labels >= 0, weights=WEIGHTS).loss

    (loss, (gradient,)), (expected, (expected_gradient,)) = (
        value_and_grads(f, [hidden], uneven((2,))) for f in (fused, parts)
    )
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-12)
    assert not torch.equal(loss, renyi_loss(hidden, weight, labels, 0.8).loss)


def test_the_fused_loss_looks_at_the_weights_before_the_head_looks_at_labels(problem):
    hidden, weight, labels = problem
    with pytest.raises(ValueError, match=r"^weights:"):
        renyi_loss(hidden, weight, labels + 7, 0.8, weights=WEIGHTS[:3])


# errors


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        (torch.full((3,), 1 / 3), ValueError, r"expected \[K\] = \[2\]"),
        (torch.tensor([[0.5, 0.5]]), ValueError, r"expected \[K\] = \[2\]"),
        (torch.tensor(1.0), ValueError, r"expected \[K\] = \[2\]"),
        (torch.tensor([0, 1]), TypeError, "got torch.int64"),
        ([0.5, 0.5], TypeError, "got list"),
        (torch.tensor([0.5, 0.5], requires_grad=True), ValueError, "detach"),
        (torch.tensor([0.5, 0.5], device="meta"), ValueError, "got one on meta"),
        *(
            (torch.tensor(weights), ValueError, r"with the sum 1; got .* divide them by their sum")
            for weights in IMPROPER
        ),
    ],
    ids=str,
)
@every_backend
def test_weights_that_do_not_fit_are_named(weights, error, message, backend):
    with pytest.raises(error, match=r"^weights:.*" + message):
        renyi_reduce(torch.zeros(2, 3), 0.8, weights=weights, backend=backend)


def test_a_sum_that_rounding_put_beside_one_is_accepted_and_divided_out():
    s, weights = torch.tensor([[-1.0], [-1.0]]), torch.tensor([0.5, 0.5 - 9e-7])
    assert renyi_reduce(s, 0.8, weights=weights).loss.item() == 1.0
    assert renyi_reduce(s, 0.8, weights=weights).responsibilities.double().sum().item() == pytest.approx(1, abs=1e-7)


@pytest.mark.parametrize(
    ("weights", "total"),
    [
        (torch.tensor([0.5, 0.500002], dtype=torch.float64), r"1\.000002"),
        (torch.full((3,), 1 / 3, dtype=torch.bfloat16), r"1\.00195312"),  # 1 when it is added up in bf16
    ],
    ids=["close to 1", "bf16"],
)
def test_a_sum_that_is_refused_is_told_with_the_digits_that_it_differs_by(weights, total):
    with pytest.raises(ValueError, match=rf"whose sum is {total}; divide them by their sum, in fp32 or fp64"):
        renyi_reduce(torch.zeros(len(weights), 1), 0.8, weights=weights)
