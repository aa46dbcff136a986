"""The adapters of a new ensemble, as they are before training. Layout: K particles, I/O in/out features, R rank."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from renyi_engine.core import seeding, size_of_memory
from renyi_engine.ensemble import targets
from renyi_engine.ensemble.config import EnsembleConfig

SPREAD_STD = 0.01
"""Standard deviation of B under init="spread"."""


def initial_adapters(maps: Mapping[str, nn.Module], config: EnsembleConfig) -> dict[str, tuple[Tensor, Tensor]]:
    """(A [K, R, I], B [K, O, R]) of every map, by path. Particle k draws its numbers from a generator of its own, whose
    seed is (seed, k).

    Raises:
        ValueError: the device of a map does not have that much memory.
    """
    K, R = config.num_particles, config.r
    num_bytes = 4 * K * R * sum(sum(targets.features(linear)) for linear in maps.values())
    room = min((size_of_memory(next(linear.parameters()).device) for linear in maps.values()), default=num_bytes)
    if num_bytes > room:
        raise ValueError(
            f"{'num_particles' if K >= R else 'r'}: {K} adapters of rank {R} do not fit into memory: they take "
            f"{num_bytes / 2**30:.0f} GiB of {room / 2**30:.0f}; give fewer, or a lower rank"
        )
    generators = [seeding.generator(config.seed, k) for k in range(K)]
    adapters = {}
    for path, linear in maps.items():
        num_in, num_out = targets.features(linear)
        # Kaiming-uniform with a = sqrt(5), as PEFT and nn.Linear have it: bound 1 / sqrt(I)
        bound = 1.0 / math.sqrt(num_in)
        A = torch.stack([torch.empty(R, num_in).uniform_(-bound, bound, generator=g) for g in generators])
        B = torch.zeros(K, num_out, R)
        if config.init == "spread":
            for k, generator in enumerate(generators):
                B[k].normal_(0.0, SPREAD_STD, generator=generator)
        adapters[path] = (A, B)
    return adapters
