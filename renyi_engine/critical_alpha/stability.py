"""Stability of one point of a model (paper 3.3): does a spread around it lower the alpha-Renyi loss?

Around a point, the loss of a narrow distribution of covariance Sigma is L + (1/2) tr((H - alpha G) Sigma) + ... (12),
with H the mean Hessian of the negative log-likelihood and G the mean outer product of its gradient. Specialists part
along v as soon as alpha exceeds v'Hv / v'Gv, so the critical alpha is the least of these ratios (13).

Both are met only in a subspace of m dimensions, through products with vectors: no matrix of P x P is formed. The
subspace holds the leading directions of G, and then, one by one, the direction that pulls the best ratio down most.

H can be replaced by its Gauss-Newton part, J' (d2 -s / d z2) J with z the model's outputs and J their Jacobian
(Martens 2020, New insights and perspectives on the natural gradient method). Left out is the curvature of z itself,
which fades where the gradients to z average out, and which alone lets a network's loss curve downwards.

Layout: N examples, B of them in a batch, P parameters, m dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from renyi_engine.core import reason, seeding


class Batch(NamedTuple):
    """Some examples at a point, each seen by a copy of the parameters of its own.

    Attributes:
        copies: of every parameter, each [B or more, ...]; example b depends on copy b alone.
        s: [B] log-likelihoods, nats.
        outputs: what s is a function of, and the parameters no more: for Gauss-Newton; None: for the Hessian.
    """

    copies: Sequence[Tensor]
    s: Tensor
    outputs: Tensor | None = None


LogLikelihoods = Callable[[Sequence[Tensor], str], Iterable[Batch]]
"""Of a point (its parameters) and of what to call the pass over the data: the examples, batch by batch. A look at the
first batch alone has no name."""

OVERSAMPLING = 4
"""Random directions beyond those wanted from the range finder (Halko, Martinsson & Tropp 2011)."""
MOST_SHIFT = 1e8
"""Largest -alpha at which a pencil is looked for that is positive definite."""
CHECK_SLOPE_NATS, CHECK_BEND_NATS = 0.05, 3e-4
"""How far the check of second derivatives moves: by what slope and curvature may change any log-likelihood."""


class CriticalAlpha(NamedTuple):
    """alpha = min_v v'Hv / v'Gv (13), and the v that attains it, with v'v = 1; of m dimensions.

    Negative or -inf where H itself curves downwards along v: the point is no minimum, and spreads at any alpha.
    """

    alpha: float
    direction: Tensor


@dataclass(frozen=True)
class Projection:
    """First and second derivatives of every example in a subspace, so that examples can be weighed anew.

    Attributes:
        basis: [P, m], orthonormal; the first `num_leading` columns are the leading directions of G, largest first.
        scores: [N, m] fp64, d s_i along each of them, nats.
        curvatures: [N, m, m] fp64, of -s_i: its Hessian, or the Gauss-Newton part of it.
        prior_curvature: of the prior, added to H in every direction: lambda / (N sigma_0^2) of the Gaussian potential.
        resolution: curvature below this share of H's largest is rounding, and counts as zero.
    """

    basis: Tensor
    scores: Tensor
    curvatures: Tensor
    num_leading: int
    prior_curvature: float
    resolution: float

    def pencil(self, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(H, G), each [m, m], of examples that weigh alike, or as `weights` [N] say."""
        weights = torch.ones(len(self.scores), dtype=torch.float64) if weights is None else weights.double()
        share = weights / weights.sum()
        H = torch.einsum("n,nab->ab", share, self.curvatures)
        G = self.scores.mT @ (share[:, None] * self.scores)
        return H + self.prior_curvature * torch.eye(len(H), dtype=H.dtype), G

    def critical_alpha(self, weights: Tensor | None = None, num_dims: int | None = None) -> CriticalAlpha:
        """In the subspace, or in its first `num_dims` dimensions: it can only sink as they grow."""
        H, G = self.pencil(weights)
        return critical_alpha(H[:num_dims, :num_dims], G[:num_dims, :num_dims], self.resolution)

    def bootstrap(self, num_resamples: int, generator: torch.Generator) -> Tensor:
        """Critical alphas, [num_resamples], of N examples drawn with replacement, in the same subspace."""
        N = len(self.scores)
        drawn = torch.randint(N, (num_resamples, N), generator=generator)
        return torch.tensor([self.critical_alpha(torch.bincount(row, minlength=N)).alpha for row in drawn])


def critical_alpha(H: Tensor, G: Tensor, resolution: float = 0.0) -> CriticalAlpha:
    """The least v'Hv / v'Gv of two symmetric [m, m], G positive semidefinite: the alpha up to which H - alpha G is too.

    Found as 1 / max_v (v'Gv / v'(H + c G)v) - c with the first c of 0, 1, 10, ... that makes H + c G positive definite;
    -inf if none does: H curves downwards along a direction in which no example has a gradient.
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


def project(
    point: Sequence[Tensor],
    log_likelihoods: LogLikelihoods,
    num_dims: int,
    *,
    prior_curvature: float = 0.0,
    seed: int = 0,
    check: bool = True,
) -> Projection:
    """H and G around `point` in a subspace of `num_dims` dimensions, or of P if there are no more.

    One half is the leading directions of G, by randomised range finding with one power iteration. Each of the others is
    what the best direction v so far leaves, Hv - alpha Gv, made orthogonal: while alpha stays this is Lanczos on
    H - alpha G, and as it sinks an inverse-free Krylov method for the pencil (Golub & Ye 2002).

    The data is passed over 2 + 1 + num_dims / 2 times.

    Args:
        point: the parameters, P in all. prior_curvature: of the prior, the same in every direction. seed: of the range
            finder.
        check: hold second derivatives against differences of the gradient, which takes at least fp32 all through.

    Raises:
        ValueError: the log-likelihoods cannot be differentiated twice, their second derivatives are wrong, or a
            derivative is not finite.
    """
    generator = seeding.generator(seed)
    num_parameters = sum(p.numel() for p in point)
    num_dims = min(num_dims, num_parameters)
    leading = _leading_directions(point, log_likelihoods, (num_dims + 1) // 2, generator)
    if check:
        _check_second_derivatives(point, log_likelihoods, leading[:, 0])
    space = _Space(point, log_likelihoods, prior_curvature)
    space.extend(leading)
    while (m := space.basis.shape[1]) < num_dims:
        best = space.projection(leading.shape[1]).critical_alpha()
        alpha = best.alpha if math.isfinite(best.alpha) else 0.0
        v = best.direction.to(space.basis)
        left = space.H_basis @ v + prior_curvature * (space.basis @ v) - alpha * (space.G_basis @ v)
        if (fresh := _orthogonal(left, space.basis)) is None:
            # v is an eigenvector of the whole pencil; whether another one lies lower, a random direction may tell
            random = torch.randn(num_parameters, generator=generator).to(left)
            fresh = _orthogonal(random, space.basis)
            assert fresh is not None, f"{m} of {num_parameters} directions fill the space"
        space.extend(fresh[:, None])
    return space.projection(leading.shape[1])


class _Space:
    """A growing basis, H and G times it, and what every example contributes to them in it."""

    def __init__(self, point: Sequence[Tensor], log_likelihoods: LogLikelihoods, prior_curvature: float) -> None:
        self._point, self._log_likelihoods, self._prior_curvature = point, log_likelihoods, prior_curvature
        empty = _flat(point)[:, None][:, :0]
        self.basis, self.H_basis, self.G_basis = empty, empty, empty
        self.scores = torch.empty(0, 0, dtype=torch.float64)
        self.curvatures = torch.empty(0, 0, 0, dtype=torch.float64)

    def extend(self, directions: Tensor) -> None:
        """Add the columns of `directions` [P, c], orthonormal to the basis: one pass over the data."""
        old, basis = self.basis.shape[1], torch.cat([self.basis, directions], dim=1)
        m = basis.shape[1]
        H_new, G_new = torch.zeros_like(directions), torch.zeros_like(directions)
        scores, blocks = [], []
        what = f"directions {old + 1} to {m}" if m > old + 1 else f"direction {m}"
        for batch in self._log_likelihoods(self._point, f"curvature along {what}"):
            gradients = _gradients(batch, create_graph=batch.outputs is None, retain_graph=True)
            flat = _stacked(gradients, batch).detach()
            along = flat @ directions  # [B, c]
            G_new += flat.mT @ along
            product_of = _hessian_product(batch, gradients) if batch.outputs is None else _gauss_newton_product(batch)
            columns = []
            for c in range(directions.shape[1]):
                product = product_of(directions[:, c])
                H_new[:, c] += product.sum(dim=0)
                columns.append((product @ basis).double().cpu())
            scores.append(along.double().cpu())
            blocks.append(torch.stack(columns, dim=-1))  # [B, m, c]
        new = _finite(torch.cat(blocks))
        N = len(new)
        curvatures = torch.zeros(N, m, m, dtype=torch.float64)
        if old:
            curvatures[:, :old, :old] = self.curvatures
        curvatures[:, :, old:] = new
        curvatures[:, old:, :old] = new[:, :old].mT
        # the new directions' own block was met from both sides
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
    whole = _flat(point)
    random = torch.randn(len(whole), min(number + OVERSAMPLING, len(whole)), generator=generator).to(whole)
    basis = torch.linalg.qr(_score_product(point, log_likelihoods, random, "leading directions, 1 of 2")).Q
    product = _score_product(point, log_likelihoods, basis, "leading directions, 2 of 2")
    vectors = torch.linalg.eigh((basis.mT @ product).double()).eigenvectors.flip(1)[:, :number]
    return torch.linalg.qr(basis @ vectors.to(basis)).Q


def _score_product(point: Sequence[Tensor], log_likelihoods: LogLikelihoods, directions: Tensor, what: str) -> Tensor:
    """G times directions [P, c], up to a factor."""
    product = torch.zeros_like(directions)
    for batch in log_likelihoods(point, what):
        scores = _stacked(_gradients(batch), batch)
        product += scores.mT @ (scores @ directions)
    return _finite(product)


def _check_second_derivatives(point: Sequence[Tensor], log_likelihoods: LogLikelihoods, v: Tensor) -> None:
    """Hold v'Hv of the first batch against central differences of the gradient.

    Of a backward that cannot be differentiated autograd may say nothing: it finds no way through, and leaves it out.
    """

    def first(at: Sequence[Tensor]) -> Iterator[Batch]:
        return iter(log_likelihoods(at, ""))

    batch = next(batches := first(point))
    gradients = _gradients(batch, create_graph=True)
    slope = _stacked(gradients, batch).detach() @ v
    exact = (_hessian_product(batch, gradients)(v) @ v).detach()
    del batches
    steps_per_unit = slope.abs().max() / CHECK_SLOPE_NATS + (exact.abs().max() / CHECK_BEND_NATS).sqrt()
    if not steps_per_unit > 0:
        return
    step = 1 / steps_per_unit
    slopes = []
    for sign in (1.0, -1.0):
        moved = [p + sign * step * part for p, part in zip(point, parts_of(v, point), strict=True)]
        batch = next(batches := first(moved))
        slopes.append(_stacked(_gradients(batch), batch) @ v)
        del batches
    difference = (slopes[1] - slopes[0]) / (2 * step)
    error, scale = (exact - difference).norm(), difference.norm() + slope.square().mean()
    if not error <= 0.02 * scale:
        raise ValueError(
            f"model: its second derivatives are wrong (off by {error / scale:.0%} against differences of gradients); "
            "a part of it has a backward that is not differentiable; use plain kernels, such as attn_implementation "
            "eager"
        )


def _gradients(batch: Batch, create_graph: bool = False, retain_graph: bool | None = None) -> tuple[Tensor, ...]:
    """Of every example, to its own copy: each [B or more, ...]."""
    return torch.autograd.grad(
        batch.s.sum(), batch.copies, create_graph=create_graph, retain_graph=retain_graph, materialize_grads=True
    )


def _finite(derivatives: Tensor) -> Tensor:
    if not derivatives.isfinite().all():
        raise ValueError("model: a derivative of its log-likelihoods is not finite at these parameters; retrain them")
    return derivatives


def _hessian_product(batch: Batch, gradients: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """From v [P] to the Hessian of -s_i times v of every example, [B, P]."""

    def product(v: Tensor) -> Tensor:
        return -_stacked(_twice(gradients, batch.copies, _copied(v, batch)), batch)

    return product


def _gauss_newton_product(batch: Batch) -> Callable[[Tensor], Tensor]:
    """From v [P] to J' (d2 -s / d z2) J v of every example, [B, P]."""
    copies, outputs = batch.copies, batch.outputs
    assert outputs is not None
    pulled_from = torch.zeros_like(outputs, requires_grad=True)
    # J' u is linear in u: its derivative to u, times v, is J v
    pulled = torch.autograd.grad(outputs, copies, pulled_from, create_graph=True, materialize_grads=True)
    slope = torch.autograd.grad(batch.s.sum(), outputs, create_graph=True)

    def product(v: Tensor) -> Tensor:
        pushed = _twice(pulled, [pulled_from], _copied(v, batch))
        bent = _twice(slope, [outputs], pushed)
        back = torch.autograd.grad(outputs, copies, bent, retain_graph=True, materialize_grads=True)
        return -_stacked(back, batch)

    return product


def _twice(outputs: Sequence[Tensor], inputs: Sequence[Tensor], upstream: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """A gradient of gradients."""
    try:
        return torch.autograd.grad(outputs, inputs, upstream, retain_graph=True, materialize_grads=True)
    except RuntimeError as error:
        raise ValueError(
            f"model: it cannot be differentiated twice ({reason(error)}); "
            "use plain kernels, such as attn_implementation eager"
        ) from None


def _copied(v: Tensor, batch: Batch) -> list[Tensor]:
    """v [P] in the shapes of the parameters, once for every copy."""
    parts = parts_of(v, [copy[0] for copy in batch.copies])
    return [part.expand_as(copy) for part, copy in zip(parts, batch.copies, strict=True)]


def _stacked(parts: Sequence[Tensor], batch: Batch) -> Tensor:
    """Parts [B or more, ...] as [B, P]."""
    return torch.cat([part[: len(batch.s)].flatten(1) for part in parts], dim=1)


def _flat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.detach().flatten() for part in parts])


def parts_of(v: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """A vector [P] in the shapes of the parameters."""
    return [part.view(p.shape) for part, p in zip(v.split([p.numel() for p in like]), like, strict=True)]


def _orthogonal(v: Tensor, basis: Tensor) -> Tensor | None:
    """v without its part in `basis`, of length 1; None if nothing but rounding is left."""
    size = v.norm()
    for _ in range(2):  # twice is enough (Kahan and Parlett)
        v = v - basis @ (basis.mT @ v)
    return v / v.norm() if v.norm() > 100 * torch.finfo(v.dtype).eps * size else None
