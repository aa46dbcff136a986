"""Where a training run stands: what a checkpoint keeps beside its tensors.

Layout: K particles.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from renyi_engine.objectives import sums


@dataclass
class Window:
    """What came since the last line of metrics."""

    examples: int = 0
    labels: int = 0
    totals: dict[str, Any] = field(default_factory=dict)
    """Sums over the examples, each one number, or a list with one of each particle."""
    alphas: list[float] = field(default_factory=list)
    """Of every step."""
    alpha_star: float | None = None
    """The last estimate of the critical alpha, where one was made."""

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add what is [examples], or [K, examples]."""
        for name, total in sums(values).items():
            before = self.totals.get(name)
            if isinstance(total, list):
                total = [a + b for a, b in zip(before or [0.0] * len(total), total, strict=True)]
            elif before is not None:
                total += before
            self.totals[name] = total


@dataclass
class State:
    """What a checkpoint keeps beside the tensors."""

    micro_batch_size: int
    """Examples that the device has memory for at once, as far as is known."""
    skipped: list[int]
    """Updates that each particle was spared."""
    skipped_in_a_row: list[int]
    step: int = 0
    tokens: int = 0
    alpha: float = 0.0
    """Of the last step."""
    recent_nlls: list[float] = field(default_factory=list)
    """What a spike is told by: see `watchdog`."""
    window: Window = field(default_factory=Window)
