"""Whether compiled layers give what uncompiled ones give: it is tried with a few tokens.

Layout: K particles, N tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from renyi_engine.core import is_out_of_memory, reason
from renyi_engine.ensemble import architecture

APART = {torch.float32: 1e-3, torch.float64: 1e-3}
APART_LOW = 0.1
"""How far the gradients may be apart, relative to their norm, by the dtype of the base. The order of additions differs,
and so does the place of rounding."""


class Measured(NamedTuple):
    """hidden: ``[K, ..., D]``. gradients: ``[K, P]``, of a sum of them; None if no gradient is asked for."""

    hidden: Tensor
    gradients: Tensor | None


def measure(read: Callable[[], Tensor], parameters: Sequence[Tensor]) -> Measured:
    """What `read()` gives, and its gradient by the parameters ``[K, ...]``."""
    hidden = read()
    if not hidden.requires_grad:
        return Measured(hidden, None)
    direction = torch.arange(hidden[0].numel(), device=hidden.device).float().sin().view(hidden[0].shape)
    found = torch.autograd.grad((hidden * direction).sum(), parameters, materialize_grads=True, allow_unused=True)
    return Measured(hidden.detach(), torch.cat([gradient.flatten(1) for gradient in found], dim=1))


def obstacle(read: Callable[[], Tensor], parameters: Sequence[Tensor], uncompiled: Measured) -> str | None:
    """Why the layers, which are compiled now, cannot run so, in words; None if they can."""
    try:
        compiled = measure(read, parameters)
    except Exception as error:  # compilers may raise anything
        if is_out_of_memory(error):
            raise
        return in_words(error)
    # a broken particle says nothing of the layers
    healthy = uncompiled.hidden.isfinite().flatten(1).all(dim=1)
    if not architecture.close(compiled.hidden[healthy], uncompiled.hidden[healthy]):
        return "compiled they give other hidden states"
    if compiled.gradients is not None and uncompiled.gradients is not None:
        truth = uncompiled.gradients[healthy]
        distance = (compiled.gradients[healthy] - truth).norm(dim=1)
        if not (distance <= APART.get(uncompiled.hidden.dtype, APART_LOW) * truth.norm(dim=1)).all():
            return "compiled they give other gradients"
    return None


def in_words(error: Exception) -> str:
    """The first line of an error of torch.compile; the others say where in torch it was raised."""
    cause = getattr(error, "inner_exception", error)  # which a compiler raised
    first = next((line.strip() for line in str(cause).splitlines() if line.strip()), "")
    return f"{type(cause).__name__}: {first}" if first else reason(cause)
