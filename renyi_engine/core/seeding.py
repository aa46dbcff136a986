"""Random number generators, each made from a few whole numbers such as a seed and a step."""

from __future__ import annotations

import numpy as np
import torch


def generator(*numbers: int) -> torch.Generator:
    """A CPU generator for `numbers`, each at least 0. Other numbers give another generator.

    The numbers are mixed into one seed first, because torch keeps only 32 bits of a seed.
    """
    mixed = np.random.SeedSequence(numbers).generate_state(1, np.uint32)[0]
    return torch.Generator().manual_seed(int(mixed))
