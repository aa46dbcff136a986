"""First and second derivatives of log-likelihoods in the parameters of a model, of every example by itself.

Every example has a copy of the parameters of its own, so the gradient in copy b is that of example b. Second
derivatives are only ever multiplied by vectors: no matrix of P x P is formed.

The Hessian can be replaced by its Gauss-Newton part, J' (d2 -s / d z2) J, with z the outputs of the model and J their
Jacobian (Martens 2020, New insights and perspectives on the natural gradient method). It leaves out the curvature of z.
That curvature fades where the gradients in z average out. Where -s is convex in z, it alone lets the loss curve
downwards.

Layout: B examples of a batch, P parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from renyi_engine.core import reason

CHECK_SLOPE_NATS, CHECK_BEND_NATS = 0.05, 3e-4
"""How far the check of second derivatives steps: until slope or curvature changes some log-likelihood by this much."""


class Batch(NamedTuple):
    """Some examples at a point. Each example has a copy of the parameters of its own.

    Attributes:
        copies: the copies of every parameter, each [B or more, ...]; example b depends on copy b alone.
        s: [B] log-likelihoods, nats.
        outputs: z, if the Gauss-Newton part is wanted: s must depend on the parameters through z alone. None if the
            Hessian is wanted.
    """

    copies: Sequence[Tensor]
    s: Tensor
    outputs: Tensor | None = None


LogLikelihoods = Callable[[Sequence[Tensor], str], Iterable[Batch]]
"""Gives the examples at a point, batch by batch. Arguments: the parameters of the point, and a name for this pass over
the data, which a progress bar may show; the name is empty if only the first batch is looked at."""


def gradients(batch: Batch, create_graph: bool = False, retain_graph: bool | None = None) -> tuple[Tensor, ...]:
    """The gradient of every example in its own copy of each parameter: each [B or more, ...]."""
    return torch.autograd.grad(
        batch.s.sum(), batch.copies, create_graph=create_graph, retain_graph=retain_graph, materialize_grads=True
    )


def finite(derivatives: Tensor) -> Tensor:
    if not derivatives.isfinite().all():
        raise ValueError(
            "model: a derivative of its log-likelihoods is not finite at this adapter; train it anew, or choose another"
        )
    return derivatives


def hessian_product(batch: Batch, slopes: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """A function of v [P]: for every example the Hessian of -s_i, times v, [B, P]."""

    def product(v: Tensor) -> Tensor:
        return -stacked(_twice(slopes, batch.copies, _copied(v, batch)), batch)

    return product


def gauss_newton_product(batch: Batch) -> Callable[[Tensor], Tensor]:
    """A function of v [P]: for every example J' (d2 -s / d z2) J v, [B, P]."""
    copies, outputs = batch.copies, batch.outputs
    assert outputs is not None
    pulled_from = torch.zeros_like(outputs, requires_grad=True)
    # J' u is linear in u, so its derivative in u, times v, is J v
    pulled = torch.autograd.grad(outputs, copies, pulled_from, create_graph=True, materialize_grads=True)
    slope = torch.autograd.grad(batch.s.sum(), outputs, create_graph=True)

    def product(v: Tensor) -> Tensor:
        pushed = _twice(pulled, [pulled_from], _copied(v, batch))
        bent = _twice(slope, [outputs], pushed)
        back = torch.autograd.grad(outputs, copies, bent, retain_graph=True, materialize_grads=True)
        return -stacked(back, batch)

    return product


def _twice(outputs: Sequence[Tensor], inputs: Sequence[Tensor], upstream: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """A derivative of derivatives."""
    try:
        return torch.autograd.grad(outputs, inputs, upstream, retain_graph=True, materialize_grads=True)
    except RuntimeError as error:
        raise ValueError(
            f"model: it cannot be differentiated twice ({reason(error)}); "
            "use plain kernels, for instance with --attn_implementation eager"
        ) from None


def _copied(v: Tensor, batch: Batch) -> list[Tensor]:
    """v [P] in the shapes of the parameters, the same for every copy."""
    parts = parts_of(v, [copy[0] for copy in batch.copies])
    return [part.expand_as(copy) for part, copy in zip(parts, batch.copies, strict=True)]


def stacked(parts: Sequence[Tensor], batch: Batch) -> Tensor:
    """Parts [B or more, ...], one for each parameter, side by side as [B, P]."""
    return torch.cat([part[: len(batch.s)].flatten(1) for part in parts], dim=1)


def flat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.detach().flatten() for part in parts])


def parts_of(v: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """A vector [P] in the shapes of the parameters."""
    return [part.view(p.shape) for part, p in zip(v.split([p.numel() for p in like]), like, strict=True)]


def check_second_derivatives(point: Sequence[Tensor], log_likelihoods: LogLikelihoods, v: Tensor) -> None:
    """Compare v'Hv of the first batch with central differences of the gradient.

    Autograd may be silent about a backward that cannot be differentiated: it then leaves that part out of H.

    Raises:
        ValueError: they differ.
    """

    def first(at: Sequence[Tensor]) -> Iterator[Batch]:
        return iter(log_likelihoods(at, ""))

    batch = next(batches := first(point))
    first_order = gradients(batch, create_graph=True)
    slope = stacked(first_order, batch).detach() @ v
    exact = (hessian_product(batch, first_order)(v) @ v).detach()
    del batches
    steps_per_unit = slope.abs().max() / CHECK_SLOPE_NATS + (exact.abs().max() / CHECK_BEND_NATS).sqrt()
    if not steps_per_unit > 0:
        return
    step = 1 / steps_per_unit
    slopes = []
    for sign in (1.0, -1.0):
        moved = [p + sign * step * part for p, part in zip(point, parts_of(v, point), strict=True)]
        batch = next(batches := first(moved))
        slopes.append(stacked(gradients(batch), batch) @ v)
        del batches
    difference = (slopes[1] - slopes[0]) / (2 * step)
    error, scale = (exact - difference).norm(), difference.norm() + slope.square().mean()
    if not error <= 0.02 * scale:
        raise ValueError(
            f"model: its second derivatives are wrong (off by {error / scale:.0%} from differences of gradients): the "
            "backward of some part cannot be differentiated; use plain kernels, for instance with "
            "--attn_implementation eager"
        )
