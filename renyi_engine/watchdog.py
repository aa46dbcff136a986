"""The watchdog over the loss: a step whose loss jumps far above the steps before it is not learnt from."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

HISTORY = 20
"""Steps that a loss is compared with; before there are so many, nothing is a spike."""


def spike_limit(threshold: float | None, recent: Sequence[float]) -> float:
    """The largest loss that is no spike: `threshold` times the median of the `recent` ones, or infinity."""
    if threshold is None or len(recent) < HISTORY:
        return math.inf
    return threshold * statistics.median(recent)


def remember(recent: Sequence[float], loss: float) -> list[float]:
    """The recent losses with one more, of a step that was no spike."""
    return [*recent, loss][-HISTORY:]
