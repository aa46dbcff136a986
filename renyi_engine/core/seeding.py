"""Random generators that are told apart by whole numbers."""

from __future__ import annotations

import numpy as np
import torch


def generator(*numbers: int) -> torch.Generator:
    """A CPU generator for `numbers`, each at least 0.

    Mixed first: torch keeps 32 bits of a seed, and numbers shifted into one may collide.
    """
    mixed = np.random.SeedSequence(numbers).generate_state(1, np.uint32)[0]
    return torch.Generator().manual_seed(int(mixed))
