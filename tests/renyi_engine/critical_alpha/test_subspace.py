"""The subspace holds what dense matrices give, and its critical alpha sinks to that of the whole space.

Layout: N examples, P parameters, m dimensions.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.func import hessian, jacrev, vmap

from renyi_engine.critical_alpha.derivatives import Batch
from renyi_engine.critical_alpha.projection import critical_alpha
from renyi_engine.critical_alpha.subspace import project
from renyi_engine.theory.two_regimes import TwoRegimes

from .regression import P, Regression, dense_alpha, log_density, network, outputs


@pytest.fixture(scope="module")
def regression():
    return Regression()


@pytest.mark.parametrize("curved_down", [False, True], ids=["at a minimum", "before it"])
def test_in_the_full_space_it_is_the_dense_generalised_eigenproblem(curved_down):
    net = Regression(curved_down=curved_down)
    expected = dense_alpha(net.H, net.G)
    assert (expected < 0) == curved_down
    found = project(net.point, net.batches, P, seed=1)
    alpha, direction = found.critical_alpha()
    assert alpha == pytest.approx(expected, rel=1e-4)
    v = found.basis @ direction
    assert (v @ net.H @ v / (v @ net.G @ v)).item() == pytest.approx(expected, rel=1e-4)
    assert v.norm().item() == pytest.approx(1)


def test_every_part_of_a_projection_is_what_the_dense_matrices_give(regression):
    found = project(regression.point, regression.batches, 7, prior_curvature=0.25)
    Q = found.basis
    torch.testing.assert_close(Q.mT @ Q, torch.eye(7, dtype=Q.dtype))
    H, G = found.pencil()
    torch.testing.assert_close(H, Q.mT @ regression.H @ Q + 0.25 * torch.eye(7, dtype=Q.dtype))
    torch.testing.assert_close(G, Q.mT @ regression.G @ Q)
    torch.testing.assert_close(found.scores, regression.scores @ Q)
    one = hessian(lambda t: -network(t, regression.x[77], regression.y[77]))(regression.theta)
    torch.testing.assert_close(found.curvatures[77], Q.mT @ one @ Q)


def test_the_gauss_newton_part_leaves_out_the_curvature_of_the_outputs():
    net = Regression(curved_down=True)
    net.gauss_newton = True
    found = project(net.point, net.batches, 7)
    Q = found.basis
    z, J = vmap(outputs, (None, 0))(net.theta, net.x), vmap(jacrev(outputs), (None, 0))(net.theta, net.x)
    bend = vmap(hessian(lambda z, y: -log_density(z, y)))(z, net.y)
    dense = J.mT @ bend @ J
    torch.testing.assert_close(found.curvatures, Q.mT @ dense @ Q)
    torch.testing.assert_close(found.pencil()[1], Q.mT @ net.G @ Q)
    whole = project(net.point, net.batches, P)
    expected = critical_alpha(dense.mean(dim=0), net.G, 1e-14).alpha
    assert whole.critical_alpha().alpha == pytest.approx(expected, rel=1e-4)
    assert expected > dense_alpha(net.H, net.G)


def test_the_first_half_is_the_leading_directions_of_G_in_their_order(regression):
    found = project(regression.point, regression.batches, 6)
    assert found.num_leading == 3
    exact = torch.linalg.eigh(regression.G).eigenvectors.flip(1)[:, :3]
    overlap = (found.basis[:, :3].mT @ exact).abs()
    assert overlap.diagonal().min() > 0.99


def test_the_critical_alpha_sinks_with_the_subspace_to_that_of_the_whole(regression):
    found = project(regression.point, regression.batches, P)
    growth = [found.critical_alpha(num_dims=m).alpha for m in range(1, P + 1)]
    assert all(later <= sooner + 1e-9 for sooner, later in pairwise(growth))
    assert growth[0] > 1.05 * growth[-1]
    # each Krylov direction helps: the next leading direction of G would not do as well
    whole = project(regression.point, regression.batches, 8)
    exact = torch.linalg.eigh(regression.G).eigenvectors.flip(1)[:, :8]
    by_size = dense_alpha(exact.mT @ regression.H @ exact, exact.mT @ regression.G @ exact)
    assert whole.critical_alpha().alpha < by_size


def test_on_the_two_regime_model_it_is_the_closed_form():
    model = TwoRegimes(theta=(0.4, -1.2), sigma=0.7, eps=0.3, delta=1.3)
    x, y = model.sample(400_000, torch.Generator().manual_seed(0))
    phi = torch.stack([x, x.clamp(min=0)], dim=1).double()
    y = y.double()
    theta = torch.linalg.lstsq(phi, y[:, None]).solution[:, 0]

    def batches(point, what):
        for features, seen in zip(phi.split(100_000), y.split(100_000), strict=True):
            copies = point[0].expand(len(features), 2).clone().requires_grad_()
            yield Batch([copies], -0.5 * ((seen - (copies * features).sum(dim=1)) / model.sigma) ** 2)

    found = project([theta], batches, 2)
    alpha, direction = found.critical_alpha()
    assert alpha == pytest.approx(model.critical_alpha, rel=0.01)
    v = found.basis @ direction
    assert abs(v[1]) > 0.999
