"""RMS norms as the one operator that PyTorch has for them, where a model writes them as five.

Which modules are RMS norms is measured, and not looked up in a list. On a GPU the operator is one kernel. On a CPU it
is the same five steps, so there the model keeps its own.

In fp32 nothing changes. In half precision the operator rounds once; many models round before they multiply with the
weight too, so their results are a little less exact.

Layout: D the size of what is normalised.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

SAME = 1e-6
"""How far a module may be from an RMS norm, relative to its largest value, in fp32."""


class RmsNorm:
    """Stands in for the forward of a module: ``weight * x / sqrt(mean(x^2) + eps)``."""

    def __init__(self, module: nn.Module, weight: Tensor, eps: float) -> None:
        self.module, self._weight, self._eps = module, weight, eps

    def install(self) -> None:
        self.module.forward = self.forward

    def remove(self) -> None:
        del self.module.forward

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != self._weight.dtype:  # what comes out then is for the module to know
            return type(self.module).forward(self.module, x)
        return nn.functional.rms_norm(x, self._weight.shape, self._weight, self._eps)


def found(model: nn.Module) -> Iterator[RmsNorm]:
    """The modules of `model` that are RMS norms of their last dimension."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and (norm := _understood(module, weight)) is not None:
            yield norm


@torch.no_grad()
def _understood(module: nn.Module, weight: Tensor) -> RmsNorm | None:
    alone = [weight is tensor for tensor in (*module.parameters(), *module.buffers())] == [True]
    if not alone or weight.dim() != 1 or not weight.is_floating_point() or "forward" in vars(module):
        return None
    (D,) = weight.shape
    x = torch.arange(2 * D, device=weight.device).float().sin().view(2, D) + 0.1
    # of small numbers, eps is a part of the mean that matters
    x = torch.stack([x, x * 1e-3])
    try:
        theirs = module(x)
    except Exception:  # it reads something else
        return None
    if not isinstance(theirs, Tensor) or theirs.shape != x.shape:
        return None
    for eps in {value for value in vars(module).values() if isinstance(value, float)}:
        for factor in (weight.float(), 1.0 + weight.float()):
            ours = nn.functional.rms_norm(x, (D,), factor, eps)
            rounded = factor.to(weight.dtype)
            if _same(theirs.float(), ours) and rounded.float().equal(factor):
                return RmsNorm(module, weight if factor.equal(weight.float()) else rounded, eps)
    return None


def _same(theirs: Tensor, ours: Tensor) -> bool:
    return bool(((theirs - ours).abs().amax(-1) <= SAME * ours.abs().amax(-1)).all())
