"""The priors on particles. Option B of the paper keeps them near zero; Option A also keeps them apart.

Layout: K particles, P numbers of one particle. The vector phi_k is all A and B of particle k: row k of the matrix of
particles [K, P]. Values are in nats. They leave out the constants of the Gaussians, which have no gradient.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

PriorName = Literal["none", "potential", "smoothed_kl"]


def prior_term(
    name: PriorName,
    particles: Tensor,
    *,
    weight: float,
    num_examples: int,
    std: float,
    bandwidth: float | None,
) -> Tensor:
    """(lambda/N) times the prior of the particles: a scalar in nats.

    Args:
        name: "potential" (Option B), "smoothed_kl" (Option A) or "none".
        particles: ``[K, P]``.
        weight: lambda. num_examples: N, the number of training examples. std: sigma_0.
        bandwidth: h, or None for the median heuristic.
    """
    if name == "none" or weight == 0.0:
        return particles.new_zeros(())
    term = potential(particles, std) if name == "potential" else smoothed_kl(particles, std, bandwidth)
    return (weight / num_examples) * term


def potential(particles: Tensor, std: float) -> Tensor:
    """(1/K) sum_k ||phi_k||^2 / (2 sigma_0^2): Option B of 4.1.

    The sum leaves out a sick particle, one whose ||phi_k||^2 is not finite. K still counts it.
    """
    norms = particles.square().sum(dim=1)
    return norms.where(_healthy(norms), 0.0).sum() / (2.0 * std**2 * len(norms))


def potential_curvature(weight: float, num_examples: int, std: float) -> float:
    """lambda / (N sigma_0^2): what (lambda/N) times the potential adds to H of (12), in every direction."""
    return weight / (num_examples * std**2)


def smoothed_kl(particles: Tensor, std: float, bandwidth: float | None) -> Tensor:
    """(1/K) sum_k [log((1/K) sum_j kappa_h(phi_k - phi_j)) - log pi(phi_k)], eq. (22).

    kappa_h(d) = exp(-||d||^2 / (2 h^2)). With bandwidth None, h is SVGD's median heuristic, without a gradient of its
    own: 2 h^2 = median_{j<k} ||phi_j - phi_k||^2 / log(K + 1). With a single particle the term is `potential`.

    A sick particle, one whose ||phi_k||^2 is not finite, is left out: both sums and the median go over the K' healthy
    particles, with 1/K' before the sum over j, and log(K' + 1). Only the 1/K before the sum over k stays. As training
    takes K times the term, each healthy particle gets the gradient that it would get without the sick ones.
    """
    norms = particles.square().sum(dim=1)
    healthy = _healthy(norms.detach())
    num_healthy = healthy.sum()
    # the healthy particle that is nearest to zero stands in the place of every sick one
    nearest = norms.detach().where(healthy, torch.inf).argmin().view(1)
    squared = squared_distances(particles.where(healthy[:, None], particles.detach().index_select(0, nearest)))
    if bandwidth is not None:
        # full, unlike as_tensor, copies nothing to the device; but it takes no number that the dtype does not hold
        largest = torch.finfo(squared.dtype).max
        h2 = torch.full((), min(bandwidth**2, largest), dtype=squared.dtype, device=squared.device)
    else:
        h2 = _median_bandwidth_squared(squared.detach(), healthy)
    h2 = h2.clamp(min=torch.finfo(h2.dtype).tiny)  # else 0, if the bandwidth is tiny or particles are equal
    log_kernel = (-squared / (2.0 * h2)).masked_fill(~healthy, -torch.inf)
    log_density = torch.logsumexp(log_kernel, dim=1) - num_healthy.log()
    return log_density.where(healthy, 0.0).sum() / len(norms) + potential(particles, std)


def squared_distances(particles: Tensor) -> Tensor:
    """||phi_k - phi_j||^2, [K, K]. The particle nearest to zero is subtracted from all first. So the Gram matrix loses
    no digits if particles are close to each other, or if one is far away."""
    nearest = particles.square().sum(dim=1).argmin().view(1)
    centred = particles - particles.detach().index_select(0, nearest)
    gram = centred @ centred.mT
    norms = gram.diagonal()
    return (norms[:, None] + norms[None, :] - 2.0 * gram).clamp(min=0.0)


def _healthy(norms: Tensor) -> Tensor:
    """[K]: whether each squared norm is finite, and so small that squared distances are finite too."""
    return norms < torch.finfo(norms.dtype).max / 16


def _median_bandwidth_squared(squared: Tensor, healthy: Tensor) -> Tensor:
    """h^2 by the median heuristic, over the pairs of healthy particles. It is 1 if there is no pair."""
    num_particles = len(healthy)
    if num_particles == 1:
        return squared.new_ones(())
    distances = squared.masked_fill(~(healthy[:, None] & healthy), torch.inf)
    pairs = distances[tuple(torch.triu_indices(num_particles, num_particles, offset=1, device=squared.device))]
    # the median of the finite ones, without `nanmedian`: that may wait for a GPU
    num_healthy = healthy.sum()
    middle = ((num_healthy * (num_healthy - 1) // 2 - 1) // 2).clamp(min=0)
    h2 = pairs.sort().values.index_select(0, middle.view(1)).squeeze(0) / (2.0 * (num_healthy + 1).log())
    return h2.where(num_healthy > 1, 1.0)
