"""Spikes: the particles do not learn from a step whose loss is far above the loss of the steps before it.

The loss that is compared is the NLL of the mixture per label, in nats, because it does not depend on alpha.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

HISTORY = 20
"""A step is compared with this many steps before it. As long as there are fewer, no step is a spike."""


def spike_limit(threshold: float | None, recent: Sequence[float]) -> float:
    """The largest NLL that is no spike: `threshold` times the median of the `recent` NLLs, or infinity."""
    if threshold is None or len(recent) < HISTORY:
        return math.inf
    return threshold * statistics.median(recent)


def remember(recent: Sequence[float], nll: float) -> list[float]:
    """The `recent` NLLs after a step that was learnt from, whose own is `nll`. The oldest ones are dropped."""
    return [*recent, nll][-HISTORY:] if math.isfinite(nll) else list(recent)
