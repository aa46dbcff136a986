"""One optimizer for K particles that do not touch each other: each is clipped, checked and skipped by itself.

AdamW works on each number alone, so it does not couple the particles of one matrix. Clipping them together would couple
them: one particle with a large gradient would make the gradients of all others small.

Nothing here asks the device for a value: a particle that is not updated is chosen by a mask.

Layout: K particles, P numbers of one particle.
"""

from __future__ import annotations

import torch
from torch import Tensor


def clip_grad_norms_(gradients: Tensor, norms: Tensor, max_norm: float) -> None:
    """`torch.nn.utils.clip_grad_norm_` for each particle by itself. `gradients` [K, P], `norms` [K]; max_norm 0 leaves
    all as they are."""
    if max_norm > 0.0:
        gradients.mul_((max_norm / (norms + 1e-6)).clamp(max=1.0)[:, None])


@torch.no_grad()
def step_healthy(optimizer: torch.optim.Optimizer, healthy: Tensor) -> None:
    """One AdamW step of the particles for which `healthy` [K] is true. The others keep their parameters and moments bit
    for bit. If no particle is healthy, no step is counted.

    `optimizer` has one parameter, the matrix [K, P] of all particles, which has a gradient.
    """
    (values,) = optimizer.param_groups[0]["params"]
    state = optimizer.state[values]
    if not state:  # AdamW would make the same ones in its first step
        state["step"] = torch.zeros((), dtype=torch.float32, device=values.device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(values), torch.zeros_like(values)
    rows, of_rows = healthy[:, None], (values, state["exp_avg"], state["exp_avg_sq"])
    before, step = [tensor.clone() for tensor in of_rows], state["step"].clone()
    values.grad.masked_fill_(~rows, 0.0)
    optimizer.step()
    for tensor, kept in zip(of_rows, before, strict=True):
        torch.where(rows, tensor, kept, out=tensor)
    torch.where(healthy.any(), state["step"], step, out=state["step"])
