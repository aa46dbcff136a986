"""H, G and the critical alpha from derivatives, against dense matrices, closed forms and the loss itself.

Layout: N examples, P parameters, m dimensions.
"""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import scipy.linalg
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.func import hessian, jacrev, vmap

from renyi_engine.critical_alpha.stability import Batch, Projection, critical_alpha, project
from renyi_engine.theory.two_regimes import TwoRegimes
from renyi_kernels import linear_logprob, renyi_reduce

HIDDEN, IN = 3, 2
P = HIDDEN * IN + HIDDEN + HIDDEN + 2


def outputs(theta: Tensor, x: Tensor) -> Tensor:
    """Mean and log-variance, [2], that a two-layer network predicts."""
    first, bias, second, rest = theta.split([HIDDEN * IN, HIDDEN, HIDDEN, 2])
    mean = torch.tanh(first.view(HIDDEN, IN) @ x + bias) @ second + rest[0]
    return torch.stack([mean, rest[1] * (1 + 0.3 * x[0])])


def log_density(z: Tensor, y: Tensor) -> Tensor:
    """Of a Gaussian of that mean and log-variance, nats."""
    return -0.5 * (math.log(2 * math.pi) + z[1] + (y - z[0]) ** 2 * torch.exp(-z[1]))


def network(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return log_density(outputs(theta, x), y)


class Regression:
    """A two-layer network near a minimum of its mean negative log-likelihood, and its matrices by brute force."""

    gauss_newton = False

    def __init__(self, num_examples: int = 150, curved_down: bool = False) -> None:
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randn(num_examples, IN, generator=generator, dtype=torch.float64)
        noise = torch.randn(num_examples, generator=generator, dtype=torch.float64)
        self.y = torch.sin(2 * self.x[:, 0]) + 0.4 * noise * (1 + self.x[:, 1].abs())
        self.theta = torch.randn(P, generator=generator, dtype=torch.float64).requires_grad_()
        optimizer = torch.optim.LBFGS([self.theta], max_iter=2 if curved_down else 500, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            (loss := -self.s(self.theta).mean()).backward()
            return loss

        optimizer.step(closure)
        self.theta = self.theta.detach()
        self.H = hessian(lambda t: -self.s(t).mean())(self.theta)
        self.scores = vmap(jacrev(network), (None, 0, 0))(self.theta, self.x, self.y)
        self.G = self.scores.mT @ self.scores / num_examples

    def s(self, theta: Tensor) -> Tensor:
        return vmap(network, (None, 0, 0))(theta, self.x, self.y)

    def batches(self, point, what):
        """In uneven batches, the parameters in two tensors, and with more copies than examples."""
        for start in range(0, len(self.x), 64):
            x, y = self.x[start : start + 64], self.y[start : start + 64]
            copies = [p.expand(len(x) + 3, *p.shape).clone().requires_grad_() for p in point]
            theta = torch.cat([copy.flatten(1)[: len(x)] for copy in copies], dim=1)
            z = vmap(outputs)(theta, x)
            yield Batch(copies, vmap(log_density)(z, y), z if self.gauss_newton else None)

    @property
    def point(self) -> list[Tensor]:
        return [self.theta[: HIDDEN * IN].view(HIDDEN, IN), self.theta[HIDDEN * IN :]]


@pytest.fixture(scope="module")
def regression():
    return Regression()


def dense_alpha(H: Tensor, G: Tensor) -> float:
    return scipy.linalg.eigh(H.numpy(), G.numpy(), eigvals_only=True)[0]


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


class OnceOnly(torch.autograd.Function):
    """x^3, the backward of which says that it cannot be differentiated."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * upstream


class SilentlyWrong(torch.autograd.Function):
    """x^3, the backward of which does not say so: its derivative is taken for zero."""

    @staticmethod
    def forward(ctx, x):
        ctx.slope = 3 * x.detach() ** 2
        return x**3

    @staticmethod
    def backward(ctx, upstream):
        return ctx.slope * upstream


@pytest.mark.parametrize("op", [OnceOnly, SilentlyWrong])
def test_a_backward_that_is_not_differentiable_is_found_out(op):
    # autograd says nothing of either: it finds no way from the gradient back to the parameters
    x = torch.linspace(0.5, 2, 20, dtype=torch.float64)

    def batches(point, what):
        copies = point[0].expand(20, 2).clone().requires_grad_()
        yield Batch([copies], -((op.apply(copies[:, 0] * x) + copies[:, 1]) ** 2))

    with pytest.raises(ValueError, match=r"second derivatives are wrong \(off by \d\d%"):
        project([torch.tensor([0.7, -0.2], dtype=torch.float64)], batches, 2)


def test_a_kernel_that_says_it_has_no_second_derivative_is_refused():
    weight = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    point = [torch.randn(4, generator=torch.Generator().manual_seed(1))]

    def batches(backend):
        def run(point, what):
            copies = point[0].expand(5, 4).clone().requires_grad_()
            yield Batch([copies], linear_logprob(copies, weight, torch.arange(5), backend=backend))

        return run

    with pytest.raises(ValueError, match=r"cannot be differentiated twice .*reference"):
        project(point, batches("torch"), 2)
    assert project(point, batches("reference"), 2).critical_alpha().alpha > 0
