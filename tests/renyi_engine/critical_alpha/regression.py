"""A small regression near a minimum of its loss, with H and G by brute force.

Layout: N examples, P parameters.
"""

from __future__ import annotations

import math

import scipy.linalg
import torch
from torch import Tensor
from torch.func import hessian, jacrev, vmap

from renyi_engine.critical_alpha.derivatives import Batch

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


def dense_alpha(H: Tensor, G: Tensor) -> float:
    return scipy.linalg.eigh(H.numpy(), G.numpy(), eigvals_only=True)[0]
