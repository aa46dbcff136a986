"""renyi_reduce and its gradient, run where a path runs."""

from __future__ import annotations

import pytest
import torch

from renyi_kernels import RenyiOutput, renyi_reduce


@pytest.fixture(scope="session")
def reduce(device_of):
    """reduce(s, alpha, backend, mask=None, weights=None): the op run where that path runs, its results on the CPU."""

    def run(s, alpha, backend, mask=None, weights=None):
        on = device_of(backend)
        mask = None if mask is None else mask.to(on)
        out = renyi_reduce(s.to(on), alpha, mask=mask, weights=weights, backend=backend)
        return RenyiOutput(*(x.cpu() for x in out))

    return run


@pytest.fixture(scope="session")
def gradient(reduce):
    """gradient(s, alpha, upstream, backend="torch", mask=None, weights=None): of the loss, for an upstream [B]."""

    def run(s, alpha, upstream, backend="torch", mask=None, weights=None):
        s = s.detach().requires_grad_()
        loss = reduce(s, alpha, backend, mask, weights).loss
        return torch.autograd.grad(loss, s, upstream.to(loss.dtype))[0]

    return run
