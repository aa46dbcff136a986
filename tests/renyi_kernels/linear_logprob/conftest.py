"""Cases for linear_logprob, and the op run where a path runs."""

from __future__ import annotations

import math

import pytest
import torch

from renyi_kernels import linear_logprob

from .heads import IGNORE


@pytest.fixture
def case(normals):
    """(hidden, weight, labels, head with its bias drawn), in fp64; logits have standard deviation `size`."""

    def build(lead, D, V, head=(), *, size=3.0, seed=0, labelled=0.8):
        draw, head = normals(seed), dict(head)
        hidden, weight = draw(*lead, D), draw(V, D) * size / math.sqrt(D)
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(0, V, lead, generator=generator)
        labels[torch.rand(lead, generator=generator) >= labelled] = IGNORE
        if head.get("bias"):
            head["bias"] = draw(V)
        return hidden, weight, labels, head

    return build


@pytest.fixture(scope="session")
def score(device_of):
    """score(hidden, weight, labels, ..., backend=...): the op run where that path runs, its result on the CPU."""

    def run(*tensors, backend, **head):
        on = device_of(backend)
        head = {name: x.to(on) if isinstance(x, torch.Tensor) else x for name, x in head.items()}
        return linear_logprob(*(x.to(on) for x in tensors), backend=backend, **head).cpu()

    return run
