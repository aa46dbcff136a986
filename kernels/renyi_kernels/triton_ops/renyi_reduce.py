"""Triton kernels of the alpha-Renyi reduction, and their launchers: one launch for the forward, one for the backward.

Layout: K particles, B sequences, T tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from renyi_kernels.reference import at_least_fp32
from renyi_kernels.triton_ops.device import on_its_device

_TILE = 4096  # elements


@triton.jit
def _log1p(y):
    """log(1 + y), right to the last digits for small y too (W. Kahan's correction for the rounding of 1 + y)"""
    u = 1.0 + y
    exact = u == 1.0
    return tl.where(exact, y, tl.log(u) * (y / tl.where(exact, 1.0, u - 1.0)))


@triton.jit
def _expm1(x):
    """exp(x) - 1 for x <= 0, in the same way"""
    u = tl.exp(x)
    log_u = tl.log(tl.where(u == 0.0, 1.0, u))
    corrected = (u - 1.0) * (x / tl.where(log_u == 0.0, 1.0, log_u))
    return tl.where(u == 1.0, x, tl.where(u < 1.0e-300, -1.0, corrected))


@triton.jit
def renyi_reduce_forward_kernel(
    token_logp_ptr,
    mask_ptr,
    loss_ptr,
    responsibilities_ptr,
    ess_ptr,
    logp_ptr,
    alpha_ptr,
    relative_ptr,
    K,
    B,
    T,
    stride_k,
    stride_b,
    stride_t,
    mask_stride_b,
    mask_stride_t,
    HAS_MASK: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """For one sequence i: s_k = sum_t token_logp[k, i, t], in fp32; then, in fp64, over the particles with w_k > 0,
    with m = max_k s_k and w_k = 1/K if there are no weights,

    loss = -m - (1/alpha) log1p( sum_k w_k expm1(alpha (s_k - m)) ),  r = softmax_k(log w + alpha s)
    ess = 1 / sum_k r_k^2

    and for alpha = 0 the mean of -s_k. Where log1p would lose digits, log(sum_k w_k exp(alpha (s_k - m))) takes its
    place, as in `reference`. alpha, and the weights divided by the largest, are read from memory, in fp64
    """
    b = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    t = tl.arange(0, BLOCK_T)
    in_k = k < K
    sums = tl.zeros((BLOCK_K, BLOCK_T), logp_ptr.dtype.element_ty)
    row_ptrs = token_logp_ptr + b * stride_b + k.to(tl.int64)[:, None] * stride_k
    for start in range(0, T, BLOCK_T):
        token = (start + t).to(tl.int64)
        in_t = token < T
        counts = in_t
        if HAS_MASK:
            counts = in_t & (tl.load(mask_ptr + b * mask_stride_b + token * mask_stride_t, mask=in_t, other=0) != 0)
        inside = in_k[:, None] & counts[None, :]
        # masked values are never read, because they may be -inf or NaN
        sums += tl.load(row_ptrs + token[None, :] * stride_t, mask=inside, other=0.0).to(sums.dtype)
    logp = tl.sum(sums, axis=1)
    k_b = k.to(tl.int64) * B + b
    tl.store(logp_ptr + k_b, logp, mask=in_k)

    alpha = tl.load(alpha_ptr)
    independent = alpha == 0.0
    relative = tl.where(in_k, 1.0, 0.0).to(tl.float64)
    if HAS_WEIGHTS:
        relative = tl.load(relative_ptr + k, mask=in_k, other=0.0)
    total = tl.sum(relative, axis=0)
    has_weight = relative != 0.0

    s = tl.where(has_weight, logp.to(tl.float64), float("-inf"))
    impossible = tl.sum(tl.where(s != float("-inf"), 1, 0), axis=0) == 0
    m = tl.where(impossible, 0.0, tl.max(s, axis=0))
    # no product of zero and infinity
    scores = alpha * tl.where(independent | impossible, 0.0, tl.where(has_weight, s, m) - m)
    excess = tl.sum(relative * _expm1(scores), axis=0) / total
    if HAS_WEIGHTS:
        log_mass = tl.where(has_weight, scores + tl.log(tl.where(has_weight, relative, 1.0)), float("-inf"))
        top = tl.max(log_mass, axis=0)
        mass = tl.exp(log_mass - top)
        loses_digits = 1.0 + excess < 0.5 / K
        log_mean = top + tl.log(tl.sum(mass, axis=0) / total)
        log_mean = tl.where(loses_digits, log_mean, _log1p(tl.where(loses_digits, 0.0, excess)))
    else:
        mass = tl.where(in_k, tl.exp(scores), 0.0)
        log_mean = _log1p(excess)
    loss = -m - log_mean / tl.where(independent, 1.0, alpha)
    loss = tl.where(independent, -tl.sum(relative * tl.where(has_weight, s, 0.0), axis=0) / total, loss)
    loss = tl.where(impossible, alpha + total + float("inf"), loss)
    r = mass / tl.sum(mass, axis=0)
    tl.store(loss_ptr + b, loss.to(loss_ptr.dtype.element_ty))
    tl.store(responsibilities_ptr + k_b, r.to(responsibilities_ptr.dtype.element_ty), mask=in_k)
    tl.store(ess_ptr + b, (1.0 / tl.sum(r * r, axis=0)).to(ess_ptr.dtype.element_ty))


@triton.jit
def renyi_reduce_backward_kernel(
    upstream_ptr,
    responsibilities_ptr,
    logp_ptr,
    mask_ptr,
    gradient_ptr,
    K,
    B,
    T,
    upstream_stride,
    mask_stride_b,
    mask_stride_t,
    HAS_MASK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """gradient[k, i, t] = -upstream[i] r[k, i] where token t counts, (21); zero if no particle with a weight gives i
    any mass: then r is the weights, and no particle has both mass and a responsibility above 0
    """
    b = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    t = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_k = k < K
    in_t = t < T
    k_b = k.to(tl.int64) * B + b
    s = tl.load(logp_ptr + k_b, mask=in_k, other=float("-inf"))
    r = tl.load(responsibilities_ptr + k_b, mask=in_k, other=0.0)
    possible = tl.sum(tl.where((s != float("-inf")) & (r != 0.0), 1, 0), axis=0) > 0
    slope = tl.where(possible, -tl.load(upstream_ptr + b * upstream_stride) * r, 0.0)
    counts = in_t
    if HAS_MASK:
        counts = in_t & (tl.load(mask_ptr + b * mask_stride_b + t * mask_stride_t, mask=in_t, other=0) != 0)
    gradient = tl.where(counts[None, :], slope[:, None], 0.0)
    gradient_ptrs = gradient_ptr + k_b[:, None] * T + t[None, :]
    tl.store(gradient_ptrs, gradient.to(gradient_ptr.dtype.element_ty), mask=in_k[:, None] & in_t[None, :])


@on_its_device
def forward(
    token_logp: Tensor, mask: Tensor | None, alpha: Tensor, relative: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss [B], responsibilities [K, B], ess [B], logp [K, B]) of token_logp [K, B, T], mask [B, T], alpha in fp64,
    and the weights [K] divided by the largest, in fp64."""
    K, B, T = token_logp.shape
    dtype = at_least_fp32(token_logp.dtype)
    loss, ess = token_logp.new_empty(B, dtype=dtype), token_logp.new_empty(B, dtype=dtype)
    responsibilities, logp = token_logp.new_empty(K, B, dtype=dtype), token_logp.new_empty(K, B, dtype=dtype)
    if B:
        mask, mask_strides = _mask(mask, token_logp)
        outputs = (loss, responsibilities, ess, logp)
        mixture = (alpha, alpha if relative is None else relative.contiguous())
        sizes = (K, B, T, *token_logp.stride(), *mask_strides)
        options = _options(K, T, mask, token_logp) | {"HAS_WEIGHTS": relative is not None}
        renyi_reduce_forward_kernel[(B,)](token_logp, mask, *outputs, *mixture, *sizes, **options)
    return loss, responsibilities, ess, logp


@on_its_device
def backward(
    upstream: Tensor, responsibilities: Tensor, logp: Tensor, mask: Tensor | None, num_tokens: int, dtype: torch.dtype
) -> Tensor:
    """The gradient [K, B, num_tokens] of the log-likelihoods of tokens, for the upstream gradient [B]."""
    K, B = responsibilities.shape
    gradient = upstream.new_empty((K, B, num_tokens), dtype=dtype)
    if gradient.numel():
        responsibilities, logp = responsibilities.contiguous(), logp.contiguous()
        mask, mask_strides = _mask(mask, upstream)
        options = _options(K, num_tokens, mask, upstream)
        grid = (B, triton.cdiv(num_tokens, options["BLOCK_T"]))
        sizes = (K, B, num_tokens, upstream.stride(0), *mask_strides)
        renyi_reduce_backward_kernel[grid](upstream, responsibilities, logp, mask, gradient, *sizes, **options)
    return gradient


def _mask(mask: Tensor | None, stand_in: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """(the mask as bytes, its strides). Without a mask, a tensor whose pointer the kernel does not follow."""
    if mask is None:
        return stand_in, (0, 0)
    as_bytes = mask.bool().view(torch.uint8)  # elsewhere in memory if the mask was not boolean
    return as_bytes, as_bytes.stride()


def _options(K: int, T: int, mask: Tensor, stand_in: Tensor) -> dict[str, int | bool]:
    block_k = triton.next_power_of_2(K)
    block_t = max(1, min(triton.next_power_of_2(T), _TILE // block_k))
    return {"HAS_MASK": mask is not stand_in, "BLOCK_K": block_k, "BLOCK_T": block_t, "num_warps": 4}
