"""One optimizer for K particles that do not touch each other: each is clipped, checked and skipped by itself.

AdamW works on each number alone, so it does not couple the particles of a stacked tensor. Clipping them together would
couple them: one particle with a large gradient would make the gradients of all others small.

Layout: K particles; parameters are stacked, [K, ...].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def grad_norms(parameters: Sequence[Tensor]) -> Tensor:
    """Norm of each particle's gradient over all stacked parameters, [K]."""
    per_parameter = [p.grad.flatten(1).norm(dim=1) for p in parameters if p.grad is not None]
    return torch.stack(per_parameter).norm(dim=0)


def clip_grad_norms_(parameters: Sequence[Tensor], norms: Tensor, max_norm: float) -> None:
    """`torch.nn.utils.clip_grad_norm_` for each particle by itself. `norms` [K]; max_norm 0 leaves all as they are."""
    if max_norm == 0.0:
        return
    factors = (max_norm / (norms + 1e-6)).clamp(max=1.0)
    for p in parameters:
        if p.grad is not None:
            p.grad.mul_(factors.view(-1, *[1] * (p.grad.dim() - 1)))


@torch.no_grad()
def step_healthy(optimizer: torch.optim.Optimizer, healthy: Tensor) -> None:
    """One optimizer step for the particles for which `healthy` [K] is true. The others keep their parameters and
    moments bit for bit. If no particle is healthy, no step is made, and none is counted.
    """
    sick = ~healthy
    num_sick = int(sick.sum())
    if num_sick == len(sick):
        return
    if num_sick == 0:
        optimizer.step()
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    before = [(p[sick].clone(), _moments(optimizer, p, sick)) for p in parameters]
    for p in parameters:
        p.grad[sick] = 0.0
    optimizer.step()
    for p, (values, moments) in zip(parameters, before, strict=True):
        p[sick] = values
        for name, moment in _stacked_state(optimizer, p).items():
            moment[sick] = moments.get(name, 0.0)  # no moments yet: they start at zero


def _moments(optimizer: torch.optim.Optimizer, p: Tensor, sick: Tensor) -> dict[str, Tensor]:
    return {name: moment[sick].clone() for name, moment in _stacked_state(optimizer, p).items()}


def _stacked_state(optimizer: torch.optim.Optimizer, p: Tensor) -> dict[str, Tensor]:
    return {name: value for name, value in optimizer.state.get(p, {}).items() if value.shape == p.shape}
