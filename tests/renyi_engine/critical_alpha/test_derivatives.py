"""A backward that cannot be differentiated is found out, whether it says so or not."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.function import once_differentiable

from renyi_engine.critical_alpha.derivatives import Batch
from renyi_engine.critical_alpha.subspace import project
from renyi_kernels import linear_logprob


class OnceOnly(torch.autograd.Function):
    """x^3, the backward of which says that it cannot be differentiated."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * upstream


class SilentlyWrong(torch.autograd.Function):
    """x^3, the backward of which does not say so: its derivative is taken for zero."""

    @staticmethod
    def forward(ctx, x):
        ctx.slope = 3 * x.detach() ** 2
        return x**3

    @staticmethod
    def backward(ctx, upstream):
        return ctx.slope * upstream


@pytest.mark.parametrize("op", [OnceOnly, SilentlyWrong])
def test_a_backward_that_is_not_differentiable_is_found_out(op):
    # autograd says nothing of either: it finds no way from the gradient back to the parameters
    x = torch.linspace(0.5, 2, 20, dtype=torch.float64)

    def batches(point, what):
        copies = point[0].expand(20, 2).clone().requires_grad_()
        yield Batch([copies], -((op.apply(copies[:, 0] * x) + copies[:, 1]) ** 2))

    with pytest.raises(ValueError, match=r"second derivatives are wrong \(off by \d\d%"):
        project([torch.tensor([0.7, -0.2], dtype=torch.float64)], batches, 2)


def test_a_kernel_that_says_it_has_no_second_derivative_is_refused():
    weight = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    point = [torch.randn(4, generator=torch.Generator().manual_seed(1))]

    def batches(backend):
        def run(point, what):
            copies = point[0].expand(5, 4).clone().requires_grad_()
            yield Batch([copies], linear_logprob(copies, weight, torch.arange(5), backend=backend))

        return run

    with pytest.raises(ValueError, match=r"cannot be differentiated twice .*reference"):
        project(point, batches("torch"), 2)
    assert project(point, batches("reference"), 2).critical_alpha().alpha > 0
