"""The priors on particles: what keeps them near zero (Option B), and apart (Option A).

Layout: K particles, P parameters of one particle. A particle phi_k is all of its A and B, across every stacked
parameter [K, ...]. Values are in nats and leave out the constants of the Gaussians, which have no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

PriorName = Literal["none", "potential", "smoothed_kl"]


def prior_term(
    name: PriorName,
    parameters: Iterable[Tensor],
    *,
    weight: float,
    num_examples: int,
    std: float,
    bandwidth: float | None,
) -> Tensor:
    """(lambda/N) times the prior of the particles, a scalar in nats.

    Args:
        name: "potential" (Option B), "smoothed_kl" (Option A) or "none".
        parameters: the stacked parameters, each ``[K, ...]``.
        weight: lambda. num_examples: N, the size of the training set. std: sigma_0.
        bandwidth: h, or None for the median heuristic.
    """
    stacked = [p.flatten(1) for p in parameters]
    if name == "none" or weight == 0.0:
        return stacked[0].new_zeros(())
    term = potential(stacked, std) if name == "potential" else smoothed_kl(stacked, std, bandwidth)
    return (weight / num_examples) * term


def potential(stacked: list[Tensor], std: float) -> Tensor:
    """(1/K) sum_k ||phi_k||^2 / (2 sigma_0^2): Option B of 4.1. `stacked`: the particles' parameters, each [K, P_i]."""
    squares = torch.stack([p.square().sum() for p in stacked]).sum()
    return squares / (2.0 * std**2 * stacked[0].shape[0])


def potential_curvature(weight: float, num_examples: int, std: float) -> float:
    """lambda / (N sigma_0^2): what (lambda/N) times the potential adds to H of (12), in every direction."""
    return weight / (num_examples * std**2)


def smoothed_kl(stacked: list[Tensor], std: float, bandwidth: float | None) -> Tensor:
    """(1/K) sum_k [log((1/K) sum_j kappa_h(phi_k - phi_j)) - log pi(phi_k)], eq. (22).

    kappa_h(d) = exp(-||d||^2 / (2 h^2)). The median heuristic (bandwidth None) is SVGD's, held constant to the
    derivative: 2 h^2 = median_{j<k} ||phi_j - phi_k||^2 / log(K + 1). One particle has nothing to keep away from: the
    term is then `potential`.
    """
    num_particles = stacked[0].shape[0]
    squared = squared_distances(stacked)
    if bandwidth is not None:
        h2 = torch.as_tensor(bandwidth**2, dtype=squared.dtype, device=squared.device)
    else:
        h2 = _median_bandwidth_squared(squared.detach())
    log_density = torch.logsumexp(-squared / (2.0 * h2), dim=1) - math.log(num_particles)
    return log_density.mean() + potential(stacked, std)


def squared_distances(stacked: list[Tensor]) -> Tensor:
    """||phi_k - phi_j||^2, [K, K]. Particles are centred: the Gram matrix must not cancel where they are close."""
    gram = torch.stack([(c := p - p.mean(dim=0)) @ c.mT for p in stacked]).sum(dim=0)
    norms = gram.diagonal()
    return (norms[:, None] + norms[None, :] - 2.0 * gram).clamp(min=0.0)


def _median_bandwidth_squared(squared: Tensor) -> Tensor:
    num_particles = squared.shape[0]
    if num_particles == 1:
        return squared.new_ones(())
    pairs = squared[tuple(torch.triu_indices(num_particles, num_particles, offset=1, device=squared.device))]
    tiny = torch.finfo(squared.dtype).tiny  # particles that coincide exactly
    return (pairs.median() / (2.0 * math.log(num_particles + 1))).clamp(min=tiny)
