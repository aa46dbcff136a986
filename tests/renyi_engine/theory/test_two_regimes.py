"""Example 2's closed forms agree with samples, with quadrature and with automatic differentiation.

N examples; theta [2]. No parameter of the example is 1.
"""

from __future__ import annotations

import math

import pytest
import torch

from renyi_engine.theory.two_regimes import GaussianPosterior, TwoRegimes, features, fit

close = torch.testing.assert_close
WORLD = TwoRegimes(theta=(0.7, -0.4), sigma=0.5, eps=0.3, delta=1.6)
CALM = TwoRegimes(theta=(-1.2, 0.3), sigma=1.4, eps=0.1, delta=-2.2)
WORLDS = [WORLD, CALM]


def draw(world: TwoRegimes, num_examples: int, seed: int = 0):
    return world.sample(num_examples, torch.Generator().manual_seed(seed))


def nll(theta, x, y, sigma):
    """The definition, without the closed form: -log N(y; theta.phi, sigma^2)."""
    return -torch.distributions.Normal(features(x) @ theta, sigma).log_prob(y)


def within_standard_errors(samples, expected, num_errors: float = 4.5):
    """The mean over the first dimension is `expected` up to the chance that [n, ...] samples leave."""
    error = samples.std(dim=0) / math.sqrt(len(samples))
    assert ((samples.mean(dim=0) - expected).abs() <= num_errors * error).all()


def population(world: TwoRegimes, function, num_x: int = 60, num_noise: int = 20):
    """E[function(x, y)] by quadrature over x on each side of the kink, over the regimes and over the noise."""
    nodes, weights = legendre(num_x)
    x = torch.cat([5 * (nodes - 1), 5 * (nodes + 1)])
    over_x = torch.cat([weights, weights]) * 5 * (-(x**2) / 2).exp() / math.sqrt(2 * math.pi)
    z, over_z = hermite(num_noise)
    slope = features(x) @ torch.tensor(world.theta, dtype=torch.float64)
    total = 0.0
    for shift, share in ((0.0, 1 - world.eps), (world.delta, world.eps)):
        y = (slope + shift * x.clamp(min=0))[:, None] + world.sigma * z
        total = total + share * (over_x[:, None] * over_z * function(x[:, None].expand_as(y), y)).sum()
    return total


def legendre(n):
    """Golub and Welsch: the nodes are eigenvalues of the Jacobi matrix of the polynomials."""
    k = torch.arange(1, n, dtype=torch.float64)
    return golub_welsch(k / (4 * k**2 - 1).sqrt(), 2.0)


def hermite(n):
    return golub_welsch(torch.arange(1, n, dtype=torch.float64).sqrt(), 1.0)


def golub_welsch(off_diagonal, mass):
    nodes, vectors = torch.linalg.eigh(torch.diag(off_diagonal, 1) + torch.diag(off_diagonal, -1))
    return nodes, mass * vectors[0] ** 2


# the data and the point-mass theory


@pytest.mark.parametrize("world", WORLDS)
def test_samples_are_the_model_with_a_second_slope_right_of_zero(world):
    x, y = draw(world, 200_000)
    within_standard_errors(x, 0.0)
    within_standard_errors(x**2, 1.0)
    residual = y - features(x) @ world.minimiser
    right = x > 0
    within_standard_errors(residual[~right] ** 2, world.sigma**2)
    within_standard_errors(residual[right], 0.0)
    spread = world.eps * (1 - world.eps) * world.delta**2 * x[right] ** 2
    within_standard_errors(residual[right] ** 2 - spread, world.sigma**2)
    third = world.eps * (1 - world.eps) * (1 - 2 * world.eps) * world.delta**3
    within_standard_errors(residual[right] ** 3 - third * x[right] ** 3, 0.0)


def test_a_generator_gives_the_same_sample_again():
    assert all(torch.equal(a, b) for a, b in zip(draw(WORLD, 9), draw(WORLD, 9), strict=True))


@pytest.mark.parametrize("world", WORLDS)
def test_the_expected_nll_has_no_slope_at_the_minimiser_and_hessian_h(world):
    expected = lambda theta: population(world, lambda x, y: nll(theta, x, y, world.sigma))
    close(torch.autograd.functional.jacobian(expected, world.minimiser), torch.zeros(2).double(), rtol=0, atol=1e-9)
    close(torch.autograd.functional.hessian(expected, world.minimiser), world.hessian, rtol=1e-9, atol=0)


@pytest.mark.parametrize("world", WORLDS)
def test_g_is_the_mean_outer_product_of_the_score(world):
    def outer(x, y):
        x, y = x.reshape(-1), y.reshape(-1)
        each = lambda x, y: torch.func.grad(lambda theta: nll(theta, x, y, world.sigma))(world.minimiser)
        score = torch.func.vmap(each)(x, y)
        return score[:, :, None] * score[:, None, :]

    quadrature = [
        population(world, lambda x, y, i=i, j=j: outer(x, y)[:, i, j].view_as(x)) for i in range(2) for j in range(2)
    ]
    close(torch.stack(quadrature).view(2, 2), world.score_second_moment, rtol=1e-9, atol=0)
    within_standard_errors(outer(*draw(world, 100_000)), world.score_second_moment)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("alpha", [0.0, 0.35, 1.0])
def test_half_the_stability_matrix_is_the_slope_of_the_expected_loss_in_sigma(world, alpha):
    def expected(covariance):
        posterior = GaussianPosterior(world.minimiser, covariance)
        return population(world, lambda x, y: posterior.loss(x, y, world.sigma, alpha))

    slope = torch.autograd.functional.jacobian(expected, torch.zeros(2, 2, dtype=torch.float64))
    close(slope, 0.5 * world.stability(alpha), rtol=1e-9, atol=1e-12)
    # Prop. 3: second order in the square root L of Sigma = L L', along any direction
    direction = torch.tensor([0.6, -1.1], dtype=torch.float64)
    along = lambda t: expected(t**2 * torch.outer(direction, direction))
    curvature = torch.autograd.functional.hessian(along, torch.tensor(0.0, dtype=torch.float64))
    close(curvature, direction @ world.stability(alpha) @ direction, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("world", WORLDS)
def test_critical_alpha_is_where_the_stability_matrix_turns_singular(world):
    chol = torch.linalg.cholesky(world.hessian)
    whitened = torch.linalg.solve_triangular(chol, world.score_second_moment, upper=False)
    whitened = torch.linalg.solve_triangular(chol, whitened.T, upper=False)
    eigenvalues, vectors = torch.linalg.eigh(whitened)
    assert world.critical_alpha == pytest.approx(1 / eigenvalues[-1].item(), rel=1e-12)
    direction = torch.linalg.solve_triangular(chol.T, vectors[:, -1:], upper=True)[:, 0]
    close(direction / direction[1], world.critical_direction, rtol=0, atol=1e-12)
    at = world.stability(world.critical_alpha)
    close(at @ world.critical_direction, torch.zeros(2).double(), rtol=0, atol=1e-12)
    assert torch.linalg.eigvalsh(world.stability(0.98 * world.critical_alpha)).min() > 0
    assert torch.linalg.eigvalsh(world.stability(1.02 * world.critical_alpha)).min() < 0


def test_critical_alpha_agrees_with_samples():
    x, _ = draw(WORLD, 1_000_000)
    plus = x.clamp(min=0)
    # a ratio of means: its error by the delta method
    contention = WORLD.eps * (1 - WORLD.eps) * WORLD.delta**2 / WORLD.sigma**2
    ratio = (plus**4).mean() / (plus**2).mean()
    error = ((plus**4 - ratio * plus**2) / (plus**2).mean()).std() / math.sqrt(len(x))
    assert abs(ratio - (1 / WORLD.critical_alpha - 1) / contention) < 4.5 * error


@pytest.mark.parametrize("clean", [{"eps": 0.0}, {"eps": 1.0}, {"delta": 0.0}])
def test_without_contamination_nothing_pays_below_alpha_1(clean):
    world = TwoRegimes(**{"theta": (0.7, -0.4), "sigma": 0.5, "eps": 0.3, "delta": 1.6} | clean)
    assert world.critical_alpha == 1.0
    close(world.stability(0.4), 0.6 * world.hessian)


# the loss and the fit


SPREAD = GaussianPosterior(
    torch.tensor([0.5, 0.2], dtype=torch.float64), torch.tensor([[0.3, -0.1], [-0.1, 0.6]], dtype=torch.float64)
)


@pytest.mark.parametrize("alpha", [0.0, 1e-6, 0.4, 1.0, 2.3])
def test_the_loss_is_the_integral_over_theta(alpha):
    x, y = torch.tensor([-1.3, 0.4, 2.0]).double(), torch.tensor([0.2, -0.5, 3.1]).double()
    # theta.phi is normal: integrate over it along the only line that counts
    for i in range(3):
        phi = features(x[i])
        mean, deviation = phi @ SPREAD.mean, (phi @ SPREAD.covariance @ phi).sqrt()
        nodes, weights = hermite(150)
        logp = torch.distributions.Normal(mean + deviation * nodes, 0.6).log_prob(y[i])
        expected = -(weights @ logp) if alpha == 0 else -torch.log1p(weights @ torch.expm1(alpha * logp)) / alpha
        close(SPREAD.loss(x, y, 0.6, alpha)[i], expected, rtol=1e-7, atol=0)


def test_the_loss_agrees_with_a_large_ensemble():
    x, y = draw(WORLD, 5, seed=3)
    root = torch.linalg.cholesky(SPREAD.covariance)
    z = torch.randn(400_000, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    theta = SPREAD.mean + z @ root.T
    logp = torch.distributions.Normal(theta @ features(x).T, 0.6).log_prob(y)
    within_standard_errors((0.7 * logp).exp(), (-0.7 * SPREAD.loss(x, y, 0.6, 0.7)).exp())


def test_alpha_0_is_the_limit():
    x, y = draw(WORLD, 20)
    close(SPREAD.loss(x, y, 0.6, 1e-9), SPREAD.loss(x, y, 0.6, 0.0), rtol=1e-7, atol=0)


def test_a_prediction_splits_its_variance_into_noise_and_spread():
    x = torch.linspace(-2, 2, 9)
    theta = torch.distributions.MultivariateNormal(SPREAD.mean, SPREAD.covariance)
    torch.manual_seed(0)
    lines = theta.sample((200_000,)) @ features(x).T
    predicted = SPREAD.predict(x, 0.6)
    within_standard_errors(lines, predicted.mean)
    within_standard_errors((lines - predicted.mean) ** 2, predicted.epistemic)
    close(predicted.noise, torch.full((9,), 0.36).double())


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_the_fit_at_alpha_0_is_conjugate_and_at_any_alpha_has_no_slope_left(alpha):
    x, y = draw(WORLD, 60)
    weight, prior_std, sigma = 1.7, 0.8, 0.6
    found = fit(x, y, sigma=sigma, alpha=alpha, weight=weight, prior_std=prior_std)
    prior = torch.distributions.MultivariateNormal(torch.zeros(2).double(), prior_std**2 * torch.eye(2).double())

    def total(mean, covariance):
        posterior = GaussianPosterior(mean, covariance)
        divergence = torch.distributions.kl_divergence(torch.distributions.MultivariateNormal(mean, covariance), prior)
        return posterior.loss(x, y, sigma, alpha).sum() + weight * divergence

    mean, covariance = found.mean.requires_grad_(), found.covariance.requires_grad_()
    for slope in torch.autograd.grad(total(mean, covariance), (mean, covariance)):
        close((slope + slope.mT) / 2 if slope.dim() == 2 else slope, torch.zeros_like(slope), rtol=0, atol=1e-4)
    if alpha == 0.0:
        # Bayes' rule with the likelihood to the power of 1 / lambda
        phi = features(x)
        precision = phi.T @ phi / (weight * sigma**2) + torch.eye(2).double() / prior_std**2
        close(found.covariance.detach(), torch.linalg.inv(precision), rtol=1e-5, atol=1e-8)
        close(found.mean.detach(), torch.linalg.solve(precision, phi.T @ y / (weight * sigma**2)), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("world", WORLDS)
def test_spread_opens_above_critical_alpha_in_the_critical_direction_and_not_below_it(world):
    x, y = draw(world, 20_000)
    below, above = (
        fit(x, y, sigma=world.sigma, alpha=factor * world.critical_alpha, weight=1e-3, prior_std=1.5).covariance
        for factor in (0.8, 1.25)
    )
    assert below.trace() < 1e-5
    assert above[1, 1] > 0.02
    assert above[0, 0] < 1e-3 * above[1, 1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TwoRegimes((1.0, 2.0), 0.0, 0.1, 1.0), "sigma: expected a finite number > 0"),
        (lambda: TwoRegimes((1.0, 2.0), 0.5, 1.1, 1.0), "eps: expected a fraction in [0, 1]"),
        (lambda: TwoRegimes((1.0, 2.0), 0.5, 0.1, math.nan), "delta: expected"),
        (lambda: TwoRegimes((1.0,), 0.5, 0.1, 1.0), "theta"),
        (lambda: WORLD.stability(-0.1), "alpha: expected"),
        (lambda: SPREAD.loss(torch.zeros(2), torch.zeros(2), 1.0, -1.0), "alpha: expected"),
        (lambda: SPREAD.predict(torch.zeros(2), -1.0), "sigma: expected"),
        (lambda: attempt(x=torch.zeros(3)), "x, y: expected [N] and [N]"),
        (lambda: attempt(x=torch.zeros(0), y=torch.zeros(0)), "N >= 1"),
        (lambda: attempt(weight=0.0), "weight: expected"),
        (lambda: attempt(prior_std=-1.0), "prior_std: expected"),
        (lambda: attempt(alpha=math.inf), "alpha: expected"),
    ],
)
def test_what_is_wrong_is_named(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value)


def attempt(**change):
    arguments = {"x": torch.zeros(2), "y": torch.zeros(2), "sigma": 0.5, "alpha": 0.5, "weight": 1.0, "prior_std": 1.0}
    return fit(**arguments | change)
