"""Calls of renyi_reduce, and the check of a reduction against its definitions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from renyi_kernels import reference, renyi_reduce
from renyi_kernels.reference import at_least_fp32

from .comparing import eps, exact, require_close
from .drawing import Call, Draw, Tensors, look

ALPHAS = [0, 0.0, 5e-324, 1e-310, 1e-300, 1e-30, 1e-8, 1e-3, 0.3, 0.8, 1, 3.0, 50.0, 1e4, 1e300, 1.7e308]


def check_reduction(
    alpha: float, outputs: Sequence[Tensor], dtype: torch.dtype, weights: Tensor | None = None
) -> Tensor:
    """Hold loss, responsibilities and ess against the definitions, of the logp [K, B] that came with them.

    In extended precision, whose exponents reach beyond those of any alpha. Returns the true responsibilities, 0 where
    no particle that counts gives the example any mass: the loss has no gradient there.
    """
    loss, responsibilities, ess, logp = outputs
    if weights is not None:
        counts = (weights > 0).to(logp.device)
        if responsibilities[~counts].any():
            raise AssertionError("a particle of weight 0 has a responsibility")
        kept = (loss, responsibilities[counts], ess, logp[counts])
        r = torch.zeros(logp.shape).double()
        r[counts.cpu()] = _check_counting(alpha, kept, dtype, weights[weights > 0].double().numpy())
        return r
    return _check_counting(alpha, outputs, dtype, np.ones(len(logp)))


def _check_counting(alpha: float, outputs: Sequence[Tensor], dtype: torch.dtype, weights: np.ndarray) -> Tensor:
    loss, responsibilities, ess, logp = outputs
    K, B = logp.shape
    w = (weights.astype(np.longdouble) / weights.astype(np.longdouble).sum())[:, None]
    s = exact(logp).numpy().astype(np.longdouble)
    if not B:
        require_close("loss", loss, torch.zeros(0).double(), torch.zeros(0), dtype)
        return torch.zeros(K, 0).double()
    impossible = np.isneginf(s).all(axis=0)
    peak = np.where(impossible, 0, s.max(axis=0))
    below = np.where(impossible, 0, s - peak)
    if alpha == 0:
        r, right = np.broadcast_to(w, s.shape), -(w * s).sum(axis=0)
    else:
        scores = np.longdouble(alpha) * below
        excess, shares = (w * np.expm1(scores)).sum(axis=0), w * np.exp(scores)
        log_mean = np.where(excess < -0.5, np.log(shares.sum(axis=0)), np.log1p(np.maximum(excess, -0.5)))
        right = -peak - log_mean / np.longdouble(alpha)
        r = shares / shares.sum(axis=0)
    # alpha is brought between 1e-200 and 1e200: a loss above 1e100 nats, where some particles give no mass, counts as
    # infinite, and 1e-199 nats count as none
    right = np.where(impossible | (right > 1e100), np.inf, right)
    loss = loss.where(loss < 1e100, torch.inf)
    in_fp64 = lambda x: torch.from_numpy(np.asarray(x, dtype=np.float64))
    e, truth = eps(dtype), in_fp64(right)
    finite = torch.from_numpy(np.where(np.isfinite(s), abs(s), 0).max(axis=0).astype(np.float64))
    allowed = 8 * e * torch.maximum(truth.abs().where(truth.isfinite(), 0.0), finite) + 1e-199
    require_close("loss", loss, truth, allowed, dtype)
    require_close("responsibilities", responsibilities, in_fp64(r), torch.full((K, B), 8 * e).double(), dtype)
    inverse = in_fp64(1 / np.square(r).sum(axis=0))
    require_close("ess", ess, inverse, 16 * e * inverse, dtype)
    return in_fp64(np.where(impossible, 0, r))


def draw_renyi_reduce(draw: Draw) -> Call:
    K, B = draw.size(9), draw.count(6)
    with_tokens, dtype = draw.chance(0.6), draw.dtype()
    T = draw.count(9) if with_tokens else 1
    alpha = draw.one_of(*ALPHAS)
    refused = draw.chance(0.02)
    given = draw.one_of(-1.0, -1e-300, math.nan, math.inf, True, "1", None) if refused else alpha
    spread = draw.one_of(0.0, 1e-3, 1.0, 1.0, 30.0, 1e4, 1e30)
    if dtype == torch.float16:
        spread = min(spread, 1e4)
    level = draw.one_of(0.0, 3.7, 1e4)
    logp = -(level + spread * draw.uniform(K, B, T).round(decimals=draw.one_of(1, 16)))
    # where the rounding of a sum, times alpha, is much less than what `_roughly` allows of the responsibilities
    tame = spread <= 30 and alpha * T * (level + spread) * eps(at_least_fp32(dtype)) < 1e-3
    if draw.chance(0.15):
        logp[draw.uniform(K, B, T) < draw.one_of(0.1, 0.5)] = -math.inf
        tame = False
    if draw.chance(0.1):
        logp[:, draw.uniform(B) < 0.5] = -math.inf
        tame = False
    mask = draw.mask(B, T) if with_tokens and draw.chance(0.8) else None
    logp = logp.to(dtype)
    counted = torch.ones(B, T, dtype=torch.bool) if mask is None else mask.cpu().bool()
    if mask is not None and draw.chance(0.3):
        logp = logp.where(counted, draw.one_of(math.nan, -math.inf, math.inf))
        tame = False
    logp = draw.laid_out(logp if with_tokens else logp.squeeze(-1))
    weights = None
    if draw.chance(0.5):
        parts = draw.uniform(K) ** draw.one_of(0, 1, 8) * (draw.uniform(K) > draw.one_of(0.0, 0.3))
        parts[draw.random.randrange(K)] = draw.one_of(1.0, 1e-30) if parts.sum() > 1e-3 else 1.0
        weights = (parts / parts.sum()).to(draw.one_of(torch.float32, torch.float64))

    def summed(x: Tensor) -> Tensor:
        return x.where(counted, 0.0).sum(dim=-1) if with_tokens else x

    def check(outputs: Sequence[Tensor], upstream: Tensors, grads: Sequence[Tensor | None]) -> None:
        wide, tokens = at_least_fp32(dtype), exact(logp)
        size = summed(tokens.abs().where(tokens.isfinite(), 0.0))
        require_close("logp", outputs[3], summed(tokens), (T if with_tokens else 0) * eps(wide) * size, wide)
        r = check_reduction(alpha, outputs, wide, weights)
        if grads[0] is not None:
            right = -exact(upstream[0]) * r
            if with_tokens:
                right = right[..., None].expand(K, B, T).where(counted, 0.0)
            # responsibilities are kept in fp32: what is below their smallest number is zero
            # with weights the gradient is divided by 1 + excess, which has the rounding of 1 and may be 1 / (2 K)
            rounding = 8 if weights is None else 8 * K
            kept = rounding * eps(wide, dtype) * right.abs() + eps(wide) * exact(upstream[0]).abs().view(
                (1, B, 1) if with_tokens else (1, B)
            )
            require_close("gradient of logp", grads[0], right, kept, dtype)

    return Call(
        text=look(logp=logp, alpha=given, mask=mask, weights=weights) + f", spread {spread:g} nats",
        leaves=[logp],
        constants=[] if mask is None else [mask],
        run=lambda leaves: renyi_reduce(leaves[0], given, mask=mask, weights=weights, backend=draw.backend),
        check=check,
        plain=lambda leaves: [reference.renyi_reduce(summed(leaves[0]), alpha, weights)[0]],
        must_refuse=refused,
        tame=tame and (alpha == 0 or 1e-8 <= alpha <= 3),
    )
