"""Problems for lora_linears, and the op run where a path runs."""

from __future__ import annotations

import pytest

from .problems import BIASED, O, Problem, R


@pytest.fixture(scope="session")
def problem(normals):
    """In fp64 on the CPU, sized so that outputs are of order 1."""

    def build(K=3, M=4, I=5, O=O, R=R, biased=BIASED, shared_x=False, seed=0):
        draw = normals(seed)
        x = draw(M, I) if shared_x else draw(K, M, I)
        return Problem(
            x,
            [draw(o, I) / I**0.5 for o in O],
            [draw(o) if b else None for o, b in zip(O, biased, strict=True)],
            [draw(K, r, I) / I**0.5 for r in R],
            [draw(K, o, r) / r**0.5 for o, r in zip(O, R, strict=True)],
        )

    return build


@pytest.fixture(scope="session")
def place(device_of):
    """place(problem, backend, dtype): where that path runs."""
    return lambda problem, backend, dtype: problem.map(lambda t: t.to(device_of(backend), dtype))


@pytest.fixture(scope="session")
def run(value_and_grads, uneven):
    """run(problem, backend) -> [outputs beside each other, gradients of x, each A, each B], all on the CPU."""

    def both(problem, backend, order=slice(None)):
        K, M = problem.A[0].shape[0], problem.x.shape[-2]
        upstream = uneven((K, M, sum(w.shape[0] for w in problem.weights)))[order].to(problem.x.device)
        value, grads = value_and_grads(problem.all_maps(backend), problem.trained, upstream)
        return [value.cpu(), *(grad.cpu() for grad in grads)]

    return both
