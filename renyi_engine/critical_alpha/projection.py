"""From which alpha on a spread around one point of a model lowers the alpha-Renyi loss (paper 3.3).

Around a point, the loss of a narrow distribution of covariance Sigma is L + (1/2) tr((H - alpha G) Sigma) + ... (12),
with H the mean Hessian of the negative log-likelihood and G the mean outer product of its gradient. A spread along v
lowers the loss as soon as alpha exceeds v'Hv / v'Gv. The critical alpha is the least of these ratios (13).

Layout: N examples, P parameters, m dimensions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

MOST_SHIFT = 1e8
"""The largest c that `critical_alpha` tries."""


class CriticalAlpha(NamedTuple):
    """alpha = min_v v'Hv / v'Gv (13), and the v that attains it: [m], of length 1.

    alpha is negative or -inf if H itself curves downwards along v: the point is no minimum, and a spread along v lowers
    the loss at every alpha.
    """

    alpha: float
    direction: Tensor


@dataclass(frozen=True)
class Projection:
    """First and second derivatives of every example in a subspace. So examples can be weighted anew without the model.

    Attributes:
        basis: [P, m], orthonormal; the first `num_leading` columns are the leading directions of G, largest first.
        scores: [N, m] fp64, the derivative of s_i along each column, nats.
        curvatures: [N, m, m] fp64, the Hessian of -s_i, or its Gauss-Newton part.
        prior_curvature: what the prior adds to H in every direction: lambda / (N sigma_0^2) for the Gaussian potential.
        resolution: a curvature below this part of H's largest is rounding, and counts as zero.
    """

    basis: Tensor
    scores: Tensor
    curvatures: Tensor
    num_leading: int
    prior_curvature: float
    resolution: float

    def pencil(self, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(H, G), each [m, m]. Examples count alike, or as `weights` [N] says."""
        weights = torch.ones(len(self.scores), dtype=torch.float64) if weights is None else weights.double()
        mass = weights / weights.sum()
        H = torch.einsum("n,nab->ab", mass, self.curvatures)
        G = self.scores.mT @ (mass[:, None] * self.scores)
        return H + self.prior_curvature * torch.eye(len(H), dtype=H.dtype), G

    def critical_alpha(self, weights: Tensor | None = None, num_dims: int | None = None) -> CriticalAlpha:
        """The one in the subspace, or in its first `num_dims` dimensions. More dimensions can only lower it."""
        H, G = self.pencil(weights)
        return critical_alpha(H[:num_dims, :num_dims], G[:num_dims, :num_dims], self.resolution)

    def bootstrap(self, num_resamples: int, generator: torch.Generator) -> Tensor:
        """Critical alphas, [num_resamples], each of N examples drawn with replacement, in the same subspace."""
        N = len(self.scores)
        drawn = torch.randint(N, (num_resamples, N), generator=generator)
        return torch.tensor([self.critical_alpha(torch.bincount(row, minlength=N)).alpha for row in drawn])


def critical_alpha(H: Tensor, G: Tensor, resolution: float = 0.0) -> CriticalAlpha:
    """The least v'Hv / v'Gv of two symmetric [m, m], G positive semidefinite: the alpha up to which H - alpha G is too.

    It is computed as 1 / max_v (v'Gv / v'(H + c G)v) - c, with the first c of 0, 1, 10, ... that makes H + c G positive
    definite. It is -inf if none does: then H curves downwards along a direction in which no example has a gradient.
    """
    H, G = H.double(), G.double()
    flat = resolution * torch.linalg.matrix_norm(H, 2)
    H = H + flat * torch.eye(len(H), dtype=H.dtype)
    for shift in (0.0, *(10.0**power for power in range(round(math.log10(MOST_SHIFT)) + 1))):
        factor, failed = torch.linalg.cholesky_ex(H + shift * G)
        if not failed:
            half = torch.linalg.solve_triangular(factor, G, upper=False)
            ratios, vectors = torch.linalg.eigh(torch.linalg.solve_triangular(factor, half.mT, upper=False))
            v = torch.linalg.solve_triangular(factor.mT, vectors[:, -1:], upper=True)[:, 0]
            alpha = 1.0 / ratios[-1].item() - shift if ratios[-1] > 0 else math.inf
            return CriticalAlpha(alpha, v / v.norm())
    return CriticalAlpha(-math.inf, torch.linalg.eigh(H + MOST_SHIFT * G).eigenvectors[:, 0])
