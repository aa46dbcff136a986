"""Results against fp64: which error is allowed, and what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .drawing import Tensors


class Wrong(Exception):
    """A result that is not what fp64 says."""


def exact(x: Tensor) -> Tensor:
    """The same numbers in fp64, on the CPU, one after the other."""
    return x.detach().to("cpu", torch.float64, copy=True).contiguous()


def eps(*dtypes: torch.dtype) -> float:
    return max(torch.finfo(dtype).eps for dtype in dtypes)


def require_close(
    name: str,
    ours: Tensor,
    truth: Tensor,
    allowed: Tensor,
    dtype: torch.dtype,
    largest: Tensor | None = None,
    computed_in: torch.dtype | None = None,
) -> None:
    """Raise Wrong unless each entry is within `allowed` of the truth. An entry may overflow, and is not compared, where
    `largest`, the sum of absolute values, is more than the dtypes hold."""
    if ours.shape != truth.shape:
        raise Wrong(f"{name}: wrong shape: {list(ours.shape)} instead of {list(truth.shape)}")
    if ours.dtype != dtype:
        raise Wrong(f"{name}: wrong dtype: {ours.dtype} instead of {dtype}")
    ours = exact(ours)
    most = min(torch.finfo(dtype).max, torch.finfo(computed_in or dtype).max) / 4
    overflows = (truth.abs() if largest is None else largest) > most
    allowed = allowed + 4 * torch.finfo(dtype).smallest_normal * eps(dtype)
    wrong = ~((ours == truth) | overflows | ((ours - truth).abs() <= allowed))
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        kind = "NaN" if ours[at].isnan() else "infinite" if ours[at].isinf() else "wrong"
        raise Wrong(
            f"{name}: {kind}: {ours[at]:.9g} instead of {truth[at]:.9g} at {list(at)} (allowed {allowed[at]:.1e}; "
            f"{int(wrong.sum())} of {wrong.numel()} entries)"
        )


def value_and_gradients(f: Callable[[Tensors], Sequence[Tensor]], leaves: Tensors, upstream: Tensors) -> Tensors:
    """Outputs, then gradients, of a function of fp64."""
    leaves = [x.clone().requires_grad_() for x in leaves]
    outputs = f(leaves)
    found = torch.autograd.grad(outputs, leaves, upstream, allow_unused=True)
    grads = [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)]
    return [*(x.detach() for x in outputs), *grads]
