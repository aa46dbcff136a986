"""Calls of renyi_loss: a frozen head and the reduction in one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from renyi_kernels import reference, renyi_loss
from renyi_kernels.reference import at_least_fp32

from .comparing import eps, exact, require_close
from .drawing import Call, Draw, Tensors, look
from .linear_logprob import Head, vocabulary
from .renyi_reduce import ALPHAS, check_reduction


def draw_renyi_loss(draw: Draw) -> Call:
    K, B, T = draw.size(4), draw.count(4), draw.count(5)
    D, V, dtype = draw.size(17), vocabulary(draw), draw.dtype()
    if empty := draw.chance(0.03):
        D, V = draw.one_of((0, V), (D, 0))
    alpha = draw.one_of(*ALPHAS)
    head = Head.draw(draw, V, D, dtype)
    hidden, labels = draw.normal(K, B, T, D, dtype=dtype), draw.labels(B, T, num_vocabulary=V)
    wide = at_least_fp32(dtype)

    def run(leaves: Tensors) -> Sequence[Tensor]:
        options = {"chunk_mib": head.chunk_mib, "backend": draw.backend, **head.options}
        return renyi_loss(leaves[0], head.weight, labels, alpha, **options)

    def check(outputs: Sequence[Tensor], upstream: Tensors, grads: Sequence[Tensor | None]) -> None:
        by_particle = labels.cpu().expand(K, B, T)
        logp, allowed, *of_gradient = head.bounds(hidden, by_particle)
        allowed = allowed.sum(dim=-1) + (T + 8) * eps(wide) * logp.abs().sum(dim=-1)
        require_close("logp", outputs[3], logp.sum(dim=-1), allowed, wide)
        r = check_reduction(alpha, outputs, wide)
        if grads[0] is not None:
            # the kernels keep responsibilities in fp32: see check_reduction
            of_token = (-exact(upstream[0]) * r)[..., None].expand(K, B, T)
            G, error, size = of_gradient
            floor = 8 * eps(wide) * exact(upstream[0]).abs()[None, :, None, None] * size
            u = of_token.abs()[..., None]
            kept = torch.finfo(dtype).smallest_normal * eps(dtype)
            limit = u * (error + kept) + 8 * eps(dtype) * u * G.abs() + floor
            require_close("gradient of hidden", grads[0], of_token[..., None] * G, limit, dtype, size * u.clamp(min=1))

    def plain(leaves: Tensors) -> Sequence[Tensor]:
        token_logp = head.plain(leaves[0], labels.cpu().expand(K, B, T))
        return [reference.renyi_reduce(token_logp.sum(dim=-1), alpha)[0]]

    return Call(
        text=f"{look(hidden=hidden, labels=labels, alpha=alpha)}, {head.text}",
        leaves=[hidden],
        constants=[*head.constants, labels],
        run=run,
        check=check,
        plain=plain,
        may_refuse=empty or head.may_be_refused,
        tame=head.promised is not None and not empty and (alpha == 0 or 1e-8 <= alpha <= 3),
    )
