"""The critical alpha of two matrices, of weighted examples and of resamples, against closed forms and the loss itself.

Layout: N examples, P parameters, m dimensions.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.func import hessian

from renyi_engine.critical_alpha.projection import Projection, critical_alpha
from renyi_engine.critical_alpha.subspace import project
from renyi_engine.theory.two_regimes import TwoRegimes
from renyi_kernels import renyi_reduce

from .regression import Regression, network


@pytest.fixture(scope="module")
def regression():
    return Regression()


def test_matrices_that_one_can_see_through():
    H, G = torch.diag(torch.tensor([2.0, 3.0, 5.0])), torch.diag(torch.tensor([1.0, 6.0, 0.0]))
    alpha, v = critical_alpha(H, G)
    assert alpha == pytest.approx(0.5)
    assert v.abs().tolist() == pytest.approx([0, 1, 0])
    assert critical_alpha(H, torch.zeros(3, 3)).alpha == math.inf
    # curved down along a direction that some example sees, and along one that none sees
    assert critical_alpha(H - torch.diag(torch.tensor([0.0, 9.0, 0.0])), G).alpha == pytest.approx(-1.0)
    alpha, v = critical_alpha(H - torch.diag(torch.tensor([0.0, 0.0, 9.0])), G)
    assert alpha == -math.inf
    assert v.abs().tolist() == pytest.approx([0, 0, 1], abs=1e-6)


def test_curvature_in_the_null_space_of_G_lowers_the_ratio():
    # minimised over both coordinates: 2 - 1.5^2 / 3, not the ratio 2 along the first alone
    H, G = torch.tensor([[2.0, 1.5], [1.5, 3.0]]), torch.diag(torch.tensor([1.0, 0.0]))
    assert critical_alpha(H, G).alpha == pytest.approx(2 - 1.5**2 / 3)


def test_rounding_in_a_flat_direction_is_not_a_downward_curve():
    H, G = torch.diag(torch.tensor([1.0, -1e-9])), torch.diag(torch.tensor([2.0, 0.0]))
    assert critical_alpha(H, G).alpha == -math.inf
    assert critical_alpha(H, G, resolution=1e-7).alpha == pytest.approx(0.5, rel=1e-6)


@pytest.mark.parametrize("alpha", [0.35, 1.6])
def test_a_spread_along_v_changes_the_loss_by_half_of_H_minus_alpha_G(regression, alpha):
    # Prop. 3, (12), with Sigma = step^2 v v': two particles at theta +- step v
    H, G = regression.H, regression.G
    ratio, v = critical_alpha(H, G)
    step = 1e-3
    loss = lambda points: renyi_reduce(torch.stack([regression.s(p) for p in points]), alpha).loss.mean()
    theta = regression.theta
    gain = (loss([theta + step * v, theta - step * v]) - loss([theta])) / step**2
    assert gain.item() == pytest.approx(0.5 * (v @ (H - alpha * G) @ v).item(), rel=1e-3)
    assert (gain < 0) == (alpha > ratio)


def test_weighing_an_example_twice_is_having_it_twice(regression):
    found = project(regression.point, regression.batches, 5)
    twice = torch.cat([torch.arange(150), torch.tensor([4, 9])])
    Q = found.basis
    one = lambda i: hessian(lambda t: -network(t, regression.x[i], regression.y[i]))(regression.theta)
    H = (regression.H * 150 + one(4) + one(9)) / 152
    G = regression.scores[twice].mT @ regression.scores[twice] / 152
    weights = torch.bincount(twice, minlength=150)
    expected = critical_alpha(Q.mT @ H @ Q, Q.mT @ G @ Q).alpha
    assert found.critical_alpha(weights).alpha == pytest.approx(expected, rel=1e-9)


def linear_projection(phi: Tensor, residual: Tensor, sigma: float) -> Projection:
    """A linear-Gaussian model's, in all of its dimensions."""
    scores = residual[:, None] * phi / sigma**2
    hessians = phi[:, :, None] * phi[:, None, :] / sigma**2
    basis = torch.eye(phi.shape[1], dtype=phi.dtype)
    return Projection(basis, scores, hessians, 1, prior_curvature=0.0, resolution=1e-15)


def test_the_bootstrap_spreads_as_new_data_do():
    model = TwoRegimes(theta=(0.4, -1.2), sigma=0.7, eps=0.3, delta=1.3)
    generator = torch.Generator().manual_seed(0)

    def draw() -> Projection:
        x, y = model.sample(300, generator)
        phi = torch.stack([x, x.clamp(min=0)], dim=1).double()
        theta = torch.linalg.lstsq(phi, y[:, None].double()).solution[:, 0]
        return linear_projection(phi, y - phi @ theta, model.sigma)

    fresh = torch.tensor([draw().critical_alpha().alpha for _ in range(200)])
    one = draw()
    resampled = one.bootstrap(200, torch.Generator().manual_seed(1))
    assert resampled.std().item() == pytest.approx(fresh.std().item(), rel=0.3)
    assert resampled.mean().item() == pytest.approx(one.critical_alpha().alpha, rel=0.1)
    assert torch.equal(resampled, one.bootstrap(200, torch.Generator().manual_seed(1)))
