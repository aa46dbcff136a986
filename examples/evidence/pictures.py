"""What the experiments' pictures share: means with their intervals, and each seed as a grey dot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes


def draw_intervals(
    axes: Axes, places: Any, found: Sequence[Mapping[str, Any]], *, horizontal: bool = False, **style: Any
) -> None:
    """Draw metrics that `summary` made, one at each place: below one another if `horizontal`, else side by side.

    `style` is for `Axes.errorbar`.
    """
    means = np.array([one["mean"] for one in found])
    low, high = np.transpose([one["interval"] for one in found])
    lengths = np.maximum([means - low, high - means], 0)  # an interval need not hold the mean
    seeds = [(place, value) for place, one in zip(places, found, strict=True) for value in one["seeds"]]
    at, values = np.transpose(seeds)
    style = {"fmt": "o", "capsize": 3} | style
    if horizontal:
        axes.errorbar(means, places, xerr=lengths, **style)
        axes.plot(values, at, ".", color="0.6", zorder=0)
    else:
        axes.errorbar(places, means, yerr=lengths, **style)
        axes.plot(at, values, ".", color="0.6", zorder=0)
