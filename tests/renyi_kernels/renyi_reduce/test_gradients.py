"""The gradient of renyi_reduce, and what becomes of examples and particles without mass.

Layout: K particles, B sequences, T tokens; numbers are those of arXiv 2605.27747.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from renyi_kernels import RenyiOutput, renyi_reduce

from ..marks import every_alpha, fast_paths
from .definitions import RELATIVE, every_path, every_positive_alpha

# gradients; that they are minus the responsibilities times the upstream, test_values.py says


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
