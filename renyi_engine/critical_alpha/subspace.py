"""The subspace in which the critical alpha of a model is looked for: built direction by direction.

It holds the leading directions of G, and then, one by one, the direction that promises to lower the best ratio most.

Layout: N examples, P parameters, m dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from renyi_engine.core import seeding
from renyi_engine.critical_alpha import derivatives
from renyi_engine.critical_alpha.derivatives import LogLikelihoods, finite, flat, gradients, stacked
from renyi_engine.critical_alpha.projection import Projection

OVERSAMPLING = 4
"""Random directions beyond those wanted from the range finder (Halko, Martinsson & Tropp 2011)."""


def project(
    point: Sequence[Tensor],
    log_likelihoods: LogLikelihoods,
    num_dims: int,
    *,
    prior_curvature: float = 0.0,
    seed: int = 0,
    check: bool = True,
) -> Projection:
    """H and G around `point` in a subspace of `num_dims` dimensions, or of all P if that is fewer.

    One half of the dimensions are the leading directions of G, from randomised range finding with one power iteration.
    Each of the others is the residual Hv - alpha Gv of the best direction v so far, made orthogonal to the basis. While
    alpha stays the same, this is Lanczos on H - alpha G. As alpha sinks, it is an inverse-free Krylov method for the
    pencil (Golub & Ye 2002).

    It passes over the data 2 + 1 + num_dims / 2 times.

    Args:
        point: the parameters, P in all.
        prior_curvature: what the prior adds to H, the same in every direction.
        seed: the seed of the random directions.
        check: compare second derivatives with differences of the gradient. The model must compute in fp32 or better.

    Raises:
        ValueError: the log-likelihoods cannot be differentiated twice, their second derivatives are wrong, or a
            derivative is not finite.
    """
    generator = seeding.generator(seed)
    num_parameters = sum(p.numel() for p in point)
    num_dims = min(num_dims, num_parameters)
    leading = _leading_directions(point, log_likelihoods, (num_dims + 1) // 2, generator)
    if check:
        derivatives.check_second_derivatives(point, log_likelihoods, leading[:, 0])
    space = _Space(point, log_likelihoods, prior_curvature)
    space.extend(leading)
    while (m := space.basis.shape[1]) < num_dims:
        best = space.projection(leading.shape[1]).critical_alpha()
        alpha = best.alpha if math.isfinite(best.alpha) else 0.0
        v = best.direction.to(space.basis)
        left = space.H_basis @ v + prior_curvature * (space.basis @ v) - alpha * (space.G_basis @ v)
        if (fresh := _orthogonal(left, space.basis)) is None:
            # v is an eigenvector of the whole pencil; a random direction may find one with a lower ratio
            random = torch.randn(num_parameters, generator=generator).to(left)
            fresh = _orthogonal(random, space.basis)
            assert fresh is not None, f"{m} of {num_parameters} directions fill the space"
        space.extend(fresh[:, None])
    return space.projection(leading.shape[1])


class _Space:
    """A basis that grows, H and G times it, and what every example contributes to both in that basis."""

    def __init__(self, point: Sequence[Tensor], log_likelihoods: LogLikelihoods, prior_curvature: float) -> None:
        self._point, self._log_likelihoods, self._prior_curvature = point, log_likelihoods, prior_curvature
        empty = flat(point)[:, None][:, :0]
        self.basis, self.H_basis, self.G_basis = empty, empty, empty
        self.scores = torch.empty(0, 0, dtype=torch.float64)
        self.curvatures = torch.empty(0, 0, 0, dtype=torch.float64)

    def extend(self, directions: Tensor) -> None:
        """Add the columns of `directions` [P, c], orthonormal to the basis, in one pass over the data."""
        old, basis = self.basis.shape[1], torch.cat([self.basis, directions], dim=1)
        m = basis.shape[1]
        H_new, G_new = torch.zeros_like(directions), torch.zeros_like(directions)
        scores, blocks = [], []
        what = f"directions {old + 1} to {m}" if m > old + 1 else f"direction {m}"
        for batch in self._log_likelihoods(self._point, f"curvature along {what}"):
            whole = batch.outputs is None  # the whole Hessian is wanted
            slopes = gradients(batch, create_graph=whole, retain_graph=True)
            of_batch = stacked(slopes, batch).detach()
            along = of_batch @ directions  # [B, c]
            G_new += of_batch.mT @ along
            product_of = (
                derivatives.hessian_product(batch, slopes) if whole else derivatives.gauss_newton_product(batch)
            )
            columns = []
            for c in range(directions.shape[1]):
                product = product_of(directions[:, c])
                H_new[:, c] += product.sum(dim=0)
                columns.append((product @ basis).double().cpu())
            scores.append(along.double().cpu())
            blocks.append(torch.stack(columns, dim=-1))  # [B, m, c]
        new = finite(torch.cat(blocks))
        N = len(new)
        curvatures = torch.zeros(N, m, m, dtype=torch.float64)
        if old:
            curvatures[:, :old, :old] = self.curvatures
        curvatures[:, :, old:] = new
        curvatures[:, old:, :old] = new[:, :old].mT
        # the block of the new directions is symmetric up to rounding
        curvatures[:, old:, old:] = (new[:, old:] + new[:, old:].mT) / 2
        self.curvatures = curvatures
        self.scores = torch.cat([self.scores.reshape(N, old), torch.cat(scores)], dim=1)
        self.basis = basis
        self.H_basis = torch.cat([self.H_basis, H_new / N], dim=1)
        self.G_basis = torch.cat([self.G_basis, G_new / N], dim=1)

    def projection(self, num_leading: int) -> Projection:
        resolution = 10 * torch.finfo(self.basis.dtype).eps
        return Projection(self.basis, self.scores, self.curvatures, num_leading, self._prior_curvature, resolution)


def _leading_directions(
    point: Sequence[Tensor], log_likelihoods: LogLikelihoods, number: int, generator: torch.Generator
) -> Tensor:
    """[P, number], orthonormal: Rayleigh-Ritz vectors of G in the range of G times random directions, largest first."""
    whole = flat(point)
    random = torch.randn(len(whole), min(number + OVERSAMPLING, len(whole)), generator=generator).to(whole)
    basis = torch.linalg.qr(_score_product(point, log_likelihoods, random, "leading directions, 1 of 2")).Q
    product = _score_product(point, log_likelihoods, basis, "leading directions, 2 of 2")
    vectors = torch.linalg.eigh((basis.mT @ product).double()).eigenvectors.flip(1)[:, :number]
    return torch.linalg.qr(basis @ vectors.to(basis)).Q


def _score_product(point: Sequence[Tensor], log_likelihoods: LogLikelihoods, directions: Tensor, what: str) -> Tensor:
    """N G times directions [P, c]."""
    product = torch.zeros_like(directions)
    for batch in log_likelihoods(point, what):
        scores = stacked(gradients(batch), batch)
        product += scores.mT @ (scores @ directions)
    return finite(product)


def _orthogonal(v: Tensor, basis: Tensor) -> Tensor | None:
    """v without its part in `basis`, scaled to length 1; None if only rounding is left."""
    size = v.norm()
    for _ in range(2):  # twice is enough (Kahan and Parlett)
        v = v - basis @ (basis.mT @ v)
    return v / v.norm() if v.norm() > 100 * torch.finfo(v.dtype).eps * size else None
