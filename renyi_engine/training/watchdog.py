"""The watchdog over the loss: a step whose loss jumps far above the steps before it is not learnt from.

It looks at the NLL of the mixture a label, in nats, which does not change with alpha.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

HISTORY = 20
"""Steps that one is compared with; before there are so many, nothing is a spike."""


def spike_limit(threshold: float | None, recent: Sequence[float]) -> float:
    """The largest NLL that is no spike: `threshold` times the median of the `recent` ones, or infinity."""
    if threshold is None or len(recent) < HISTORY:
        return math.inf
    return threshold * statistics.median(recent)


def remember(recent: Sequence[float], nll: float) -> list[float]:
    """The last of them, with that of a step that was learnt from."""
    return [*recent, nll][-HISTORY:] if math.isfinite(nll) else list(recent)
