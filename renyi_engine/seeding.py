"""Random generators that are told apart by two whole numbers."""

from __future__ import annotations

import numpy as np
import torch


def generator(seed: int, index: int) -> torch.Generator:
    """A CPU generator for (seed, index). Mixed first: torch keeps 32 bits of a seed; shifted into one, two collide."""
    mixed = np.random.SeedSequence([seed, index]).generate_state(1, np.uint32)[0]
    return torch.Generator().manual_seed(int(mixed))
