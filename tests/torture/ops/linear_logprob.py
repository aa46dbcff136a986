"""Calls of linear_logprob, and what rounding can do in a frozen head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from renyi_kernels import IGNORE_INDEX, linear_logprob, reference
from renyi_kernels.reference import at_least_fp32

from .comparing import eps, exact, require_close
from .drawing import Call, Draw, Tensors, look

LARGE_LOGIT = 20.0
SOFTCAPS = [1e-40, 1e-3, 0.5, 3.0, 30.0, 1e3, 1e6, 1e30]


@dataclass
class Head:
    """A frozen head, and what rounding in `dtype` can do to the log-probabilities it gives."""

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    scale: float
    chunk_mib: float
    dtype: torch.dtype
    promised: float | None
    """Largest error of a log-probability, in nats, that is promised where no logit is large."""

    @classmethod
    def draw(cls, draw: Draw, V: int, D: int, dtype: torch.dtype) -> Head:
        tame = draw.chance(0.5)
        size = 1.0 if tame else draw.one_of(0.0, 1e-2, 30.0, 1e3 if dtype == torch.float16 else 1e5)
        return cls(
            draw.normal(V, D, dtype=dtype, size=3 * size / math.sqrt(max(D, 1))),
            draw.normal(V, dtype=dtype) if draw.chance(0.4) else None,
            draw.one_of(None, 3.0, 30.0) if tame else draw.one_of(None, *SOFTCAPS),
            draw.one_of(1.0, 1, 0.4, -0.6) if tame else draw.one_of(1.0, 0.0, 1e-3, -0.6, 30.0),
            draw.one_of(256.0, 256.0, 1e-4),
            dtype,
            1e-5 if tame and dtype != torch.float64 else None,
        )

    @property
    def may_be_refused(self) -> bool:
        """Whether fp32 cannot hold its cap."""
        return self.softcap is not None and self.softcap < torch.finfo(torch.float32).tiny

    @property
    def options(self) -> dict[str, Any]:
        return {"bias": self.bias, "logit_softcap": self.softcap, "logit_scale": self.scale}

    @property
    def constants(self) -> Tensors:
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    @property
    def text(self) -> str:
        return look(weight=self.weight, **self.options, chunk_mib=self.chunk_mib)

    def plain(self, hidden: Tensor, labels: Tensor) -> Tensor:
        bias = None if self.bias is None else exact(self.bias)
        return reference.linear_logprob(hidden, exact(self.weight), labels.cpu(), bias, self.softcap, self.scale)

    def bounds(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(logp, error allowed of it [...]; d logp / d hidden, error allowed, its sum of absolute values [..., D])"""
        e, W = eps(at_least_fp32(self.dtype)), exact(self.weight)
        (V, D), labels = W.shape, labels.cpu()
        labelled = labels != IGNORE_INDEX
        h = exact(hidden).where(labelled[..., None], 0.0)
        z, size = h @ W.mT, h.abs() @ W.abs().mT
        if self.bias is not None:
            z, size = z + exact(self.bias), size + exact(self.bias).abs()
        z, size, slope = self.scale * z, abs(self.scale) * size, torch.full_like(z, self.scale)
        error, error_of_slope = (D + 8) * e * size, 4 * e * slope.abs()
        if self.softcap is not None:
            tanh = torch.tanh(z / self.softcap)
            z, slope = self.softcap * tanh, slope * (1 - tanh.square())
            error_of_slope = abs(self.scale) * ((2 * error / self.softcap).clamp(max=1) + 16 * e)
            error = error.clamp(max=2 * self.softcap)
        error = (error + 8 * e * z.abs()).amax(dim=-1)
        target = torch.nn.functional.one_hot(labels.where(labelled, 0), V).double()
        log_p = torch.log_softmax(z, dim=-1)
        logp = (log_p * target).sum(dim=-1)
        allowed = 2 * error + 8 * e * (logp.abs() + math.log(V) + 1)
        p, up = log_p.exp(), labelled[..., None]
        error_of_p = (p * torch.expm1((2 * allowed[..., None]).clamp(max=50)) + 8 * e * p).clamp(max=1) + 4 * e * target
        g = slope * (target - p)
        error_of_g = slope.abs() * error_of_p + error_of_slope * (target - p).abs()
        error_of_g += 8 * eps(self.dtype) * g.abs() + torch.finfo(self.dtype).smallest_normal * eps(self.dtype)
        size = (g.abs() @ W.abs()).where(up, 0.0)
        of_gradient = (error_of_g @ W.abs()).where(up, 0.0) + ((V + 8) * e + 8 * eps(self.dtype)) * size
        if self.promised is not None:
            allowed = allowed.where(z.abs().amax(dim=-1) > LARGE_LOGIT, allowed.clamp(max=self.promised))
        return (
            logp.where(labelled, 0.0), allowed.where(labelled, 0.0), (g @ W).where(up, 0.0), of_gradient, size,
        )  # fmt: skip


def check_gradient_of_hidden(ours: Tensor, G: Tensor, error: Tensor, size: Tensor, upstream: Tensor) -> None:
    """Of `Head.bounds`, times what comes from above at each label."""
    u = upstream.abs()[..., None]
    # what the op keeps of G has the dtype of hidden too
    kept = torch.finfo(ours.dtype).smallest_normal * eps(ours.dtype)
    allowed = u * (error + kept) + 8 * eps(ours.dtype) * u * G.abs()
    require_close("gradient of hidden", ours, upstream[..., None] * G, allowed, ours.dtype, size * u.clamp(min=1))


def vocabulary(draw: Draw) -> int:
    return draw.one_of(2047, 2049, 4097, 8193) if draw.chance(0.02) else draw.size(40)


def draw_linear_logprob(draw: Draw) -> Call:
    lead = [draw.count(4) for _ in range(draw.one_of(0, 1, 1, 2, 3))]
    D, V, dtype = draw.size(33), vocabulary(draw), draw.dtype()
    if empty := draw.chance(0.03):
        D, V = draw.one_of((0, V), (D, 0))
    head = Head.draw(draw, V, D, dtype)
    hidden = draw.normal(*lead, D, dtype=dtype)
    labels = draw.labels(*lead, num_vocabulary=V)
    stray = False
    if labels.numel() and not empty and draw.chance(0.03):
        labels = labels.clone()
        labels[(0,) * labels.dim()] = draw.one_of(V, -1, -101, 2**40)
        stray = True
    of_weight = draw.floating() if draw.chance(0.02) else dtype
    head.weight = head.weight.to(of_weight)
    unlabelled = (labels == IGNORE_INDEX).cpu()
    blind = not stray and draw.chance(0.2)
    if blind:
        # an op must not look at hidden states that have no label
        hidden = draw.laid_out(hidden.cpu().where(~unlabelled[..., None], draw.one_of(math.nan, math.inf)))

    def run(leaves: Tensors) -> Sequence[Tensor]:
        options = {"chunk_mib": head.chunk_mib, "backend": draw.backend, **head.options}
        return [linear_logprob(leaves[0], head.weight, labels, **options)]

    def check(outputs: Sequence[Tensor], upstream: Tensors, grads: Sequence[Tensor | None]) -> None:
        logp, allowed, *of_gradient = head.bounds(hidden, labels)
        require_close("logp", outputs[0], logp, allowed, at_least_fp32(dtype))
        if grads[0] is not None:
            check_gradient_of_hidden(grads[0], *of_gradient, exact(upstream[0]).where(~unlabelled, 0.0))

    return Call(
        text=look(hidden=hidden, labels=labels) + (" (not finite where no label)" if blind else "") + f", {head.text}",
        leaves=[hidden],
        constants=[*head.constants, labels],
        run=run,
        check=check,
        plain=lambda leaves: [head.plain(leaves[0], labels)],
        must_refuse=of_weight != dtype or stray,
        may_refuse=empty or head.may_be_refused,
        tame=head.promised is not None and not blind and not empty,
    )
