"""Spikes: the particles do not learn from a step whose loss is far above the loss of the steps before it.

The loss that is compared is the NLL of the mixture per label, in nats, because it does not depend on alpha. It stays on
the device: which steps were learnt from is a mask, so nobody waits for a step to know the limit of the next one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

HISTORY = 20
"""A step is compared with this many steps before it. As long as there are fewer, no step is a spike."""


class RecentNlls:
    """The NLLs of the last `HISTORY` steps that were learnt from, from the oldest to the newest, in fp64."""

    def __init__(self, known: Sequence[float], device: torch.device) -> None:
        """`known`: the NLLs so far, at most `HISTORY`, all finite."""
        unknown = [math.inf] * (HISTORY - len(known))
        self._nlls = torch.tensor([*unknown, *known], dtype=torch.float64, device=device)

    def limit(self, threshold: float | None) -> Tensor:
        """The largest NLL that is no spike, a scalar: `threshold` times the median, or infinity."""
        if threshold is None:
            return torch.full_like(self._nlls[0], math.inf)
        ordered = self._nlls.sort().values
        median = (ordered[HISTORY // 2 - 1] + ordered[HISTORY // 2]) / 2
        return torch.where(ordered[-1].isinf(), math.inf, threshold * median)

    def remember(self, nll: Tensor, learnt: Tensor) -> None:
        """Add the `nll` of a step, a scalar, if `learnt` is true and it is finite. The oldest one is dropped."""
        after = torch.cat([self._nlls[1:], nll.double().view(1)])
        self._nlls = torch.where(learnt & nll.isfinite(), after, self._nlls)

    def known(self) -> list[float]:
        """The NLLs as a checkpoint keeps them. This waits for the device."""
        return [nll for nll in self._nlls.tolist() if math.isfinite(nll)]
