"""Example 2 of the paper in closed form: a line with a kink, whose slope switches at random where x > 0.

y = theta.phi(x) + c delta x_+ + sigma noise, with phi(x) = (x, x_+), x_+ = max(x, 0), c ~ Bernoulli(eps) and x, noise
standard normal. The model is y ~ N(theta.phi(x), sigma^2). It does not know of the second regime, and can only allow
for it by a spread over theta.

Layout: N examples; the parameter is theta [2]. Everything is fp64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from renyi_kernels.renyi_reduce import check_alpha

# moments of a standard normal x: E[x^2] = 1, E[x x_+] = E[x_+^2] = 1/2; E[x_+^2 phi phi'] has E[x_+^4] = 3/2 throughout
FEATURES = torch.tensor([[1.0, 0.5], [0.5, 0.5]], dtype=torch.float64)
CONTESTED = torch.full((2, 2), 1.5, dtype=torch.float64)


@dataclass(frozen=True)
class TwoRegimes:
    """The distribution of the data.

    Args:
        theta: the slope left of 0 in the first regime, and what is added to it right of 0.
        sigma: > 0, the standard deviation of the noise. The model knows it.
        eps: in [0, 1], the fraction of examples in the second regime.
        delta: what the second regime adds to the slope right of 0.

    Raises:
        ValueError: a number is out of range or not finite.
    """

    theta: tuple[float, float]
    sigma: float
    eps: float
    delta: float

    def __post_init__(self) -> None:
        if len(self.theta) != 2 or not all(map(math.isfinite, (*self.theta, self.delta))):
            raise ValueError(f"theta, delta: expected two finite slopes and one; got {self.theta} and {self.delta}")
        _positive("sigma", self.sigma)
        if not 0.0 <= self.eps <= 1.0:
            raise ValueError(f"eps: expected a fraction in [0, 1]; got {self.eps}")

    def sample(self, num_examples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(x [N], y [N])."""
        x, noise = torch.randn(2, num_examples, generator=generator, dtype=torch.float64)
        switched = torch.rand(num_examples, generator=generator, dtype=torch.float64) < self.eps
        slopes = torch.tensor(self.theta, dtype=torch.float64)
        return x, features(x) @ slopes + switched * self.delta * x.clamp(min=0.0) + self.sigma * noise

    @property
    def minimiser(self) -> Tensor:
        """[2]: theta* = theta + (0, eps delta), where the expected nll is least. E[y | x] = theta*.phi(x) for all x."""
        return torch.tensor([self.theta[0], self.theta[1] + self.eps * self.delta], dtype=torch.float64)

    @property
    def hessian(self) -> Tensor:
        """H = E[phi phi'] / sigma^2, [2, 2] nats: the Hessian of the expected nll, at every theta."""
        return FEATURES / self.sigma**2

    @property
    def score_second_moment(self) -> Tensor:
        """G = H + eps (1 - eps) delta^2 / sigma^4 E[x_+^2 phi phi'], [2, 2] nats^2: E[score score'] at theta*.

        The score is phi (y - theta*.phi) / sigma^2, and y has variance sigma^2 + eps (1 - eps) delta^2 x_+^2 given x.
        """
        return self.hessian + self.eps * (1 - self.eps) * self.delta**2 / self.sigma**4 * CONTESTED

    def stability(self, alpha: float) -> Tensor:
        """S_alpha = H - alpha G, [2, 2]: twice the slope of the expected loss in Sigma at a point mass on theta*, (12).

        A spread along v lowers the loss if v'S_alpha v < 0, and raises it if S_alpha is positive definite.

        Raises:
            ValueError: alpha is negative or not finite.
        """
        return self.hessian - check_alpha(alpha) * self.score_second_moment

    @property
    def critical_alpha(self) -> float:
        """alpha_c = min_v (v'Hv) / (v'Gv) = 1 / (1 + eps (1 - eps) delta^2 E[x_+^4] / (sigma^2 E[x_+^2])), (13)."""
        contention = self.eps * (1 - self.eps) * (self.delta / self.sigma) ** 2
        return 1.0 / (1.0 + contention * (CONTESTED[1, 1] / FEATURES[1, 1]).item())

    @property
    def critical_direction(self) -> Tensor:
        """[2]: the v of (13), along which a spread opens first: (0, 1), the slope right of 0. Any v if alpha_c = 1."""
        # v'Gv / v'Hv is largest along E[phi phi']^-1 (1, 1), because E[x_+^2 phi phi'] is a multiple of (1, 1)(1, 1)'
        return torch.tensor([0.0, 1.0], dtype=torch.float64)


class Prediction(NamedTuple):
    """What a posterior predicts for y at some x: a mean and the two parts of the variance, each with the shape of x."""

    mean: Tensor
    noise: Tensor
    """sigma^2: the variance that is left if theta is known."""
    epistemic: Tensor
    """phi' Sigma phi: what the spread over theta adds."""


@dataclass(frozen=True)
class GaussianPosterior:
    """N(mean [2], covariance [2, 2]) over theta."""

    mean: Tensor
    covariance: Tensor

    def predict(self, x: Tensor, sigma: float) -> Prediction:
        """Mean and variance of y at x, of any shape, if the noise has standard deviation sigma > 0.

        Raises:
            ValueError: sigma is not above 0.
        """
        phi = features(x)
        noise = torch.full_like(phi[..., 0], _positive("sigma", sigma) ** 2)
        return Prediction(phi @ self.mean, noise, (phi @ self.covariance * phi).sum(dim=-1))

    def loss(self, x: Tensor, y: Tensor, sigma: float, alpha: float) -> Tensor:
        """-(1/alpha) log E_theta[N(y; theta.phi, sigma^2)^alpha], or its limit at alpha = 0, nats, in the shape of x.

        With v = phi' Sigma phi: (1/2) log(2 pi sigma^2) + (1/(2 alpha)) log(1 + alpha v / sigma^2)
        + (y - m.phi)^2 / (2 (sigma^2 + alpha v)), because N(y; s, sigma^2)^alpha is N(y; s, sigma^2 / alpha) up to a
        factor, and s ~ N(m.phi, v).

        Raises:
            ValueError: sigma is not above 0; alpha is negative or not finite.
        """
        alpha = check_alpha(alpha)
        mean, noise, spread = self.predict(x, sigma)
        ratio = spread / noise
        cost = 0.5 * (ratio if alpha == 0.0 else torch.log1p(alpha * ratio) / alpha)
        # at alpha = 0 an example costs E[(y - s)^2] / (2 sigma^2), of which v / (2 sigma^2) is in `cost`
        return 0.5 * torch.log(2 * math.pi * noise) + cost + (y - mean) ** 2 / (2 * (noise + alpha * spread))


def features(x: Tensor) -> Tensor:
    """phi(x) = (x, max(x, 0)): [...] -> [..., 2]."""
    x = x.double()
    return torch.stack([x, x.clamp(min=0.0)], dim=-1)


def fit(x: Tensor, y: Tensor, *, sigma: float, alpha: float, weight: float, prior_std: float) -> GaussianPosterior:
    """The Gaussian with the least (1/N) sum_i loss_i + (lambda/N) KL(N(m, Sigma) || N(0, sigma_0^2 I)).

    Sigma = L L' with L lower triangular. The search starts at the least-squares mean with the wide spread of the prior,
    so nothing depends on chance.

    Args:
        x, y: [N]. sigma: > 0, the model's noise. alpha: finite, >= 0.
        weight: lambda > 0. prior_std: sigma_0 > 0.

    Raises:
        ValueError: x and y are not [N] with N >= 1, or a number is out of range.
        RuntimeError: the optimiser found no minimum.
    """
    from scipy.optimize import minimize

    if x.dim() != 1 or x.shape != y.shape or len(x) == 0:
        raise ValueError(f"x, y: expected [N] and [N] with N >= 1; got {list(x.shape)} and {list(y.shape)}")
    x, y, alpha = x.double(), y.double(), check_alpha(alpha)
    for name, value in (("sigma", sigma), ("weight", weight), ("prior_std", prior_std)):
        _positive(name, value)

    def unpack(parameters: Tensor) -> tuple[GaussianPosterior, Tensor]:
        m1, m2, log_l11, l21, log_l22 = parameters
        root = torch.stack([log_l11.exp(), torch.zeros_like(l21), l21, log_l22.exp()]).view(2, 2)
        return GaussianPosterior(torch.stack([m1, m2]), root @ root.T), log_l11 + log_l22

    def value_and_gradient(array):
        parameters = torch.from_numpy(array).requires_grad_()
        posterior, log_det_root = unpack(parameters)
        squares = (posterior.covariance.trace() + posterior.mean.square().sum()) / prior_std**2
        kl = 0.5 * squares - 1.0 + 2.0 * math.log(prior_std) - log_det_root
        value = posterior.loss(x, y, sigma, alpha).mean() + weight / len(x) * kl
        (gradient,) = torch.autograd.grad(value, parameters)
        return value.item(), gradient.numpy()

    mean = torch.linalg.lstsq(features(x), y[:, None], driver="gelsd").solution[:, 0]
    start = torch.cat([mean, torch.tensor([math.log(prior_std), 0.0, math.log(prior_std)], dtype=torch.float64)])
    found = minimize(
        value_and_gradient,
        start.numpy(),
        jac=True,
        method="L-BFGS-B",
        options={"ftol": 0.0, "gtol": 1e-9, "maxiter": 2000, "maxcor": 20},
    )
    if not (slope := abs(found.jac).max()) < 1e-6:
        raise RuntimeError(f"fit: no minimum: the slope is {slope:.2g} after {found.nit} iterations: {found.message}")
    with torch.no_grad():
        return unpack(torch.from_numpy(found.x))[0]


def _positive(name: str, value: float) -> float:
    if not (math.isfinite(value) and value > 0.0):
        raise ValueError(f"{name}: expected a finite number > 0; got {value}")
    return float(value)
