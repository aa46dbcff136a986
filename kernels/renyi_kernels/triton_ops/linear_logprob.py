"""The Triton kernel between the two matrix products of linear_logprob, and its launcher.

Layout: N rows, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from renyi_kernels.triton_ops.device import on_its_device

_BLOCK_V = 2048
_NUM_WARPS = 8


@triton.jit
def _logit(z, v, in_v, bias_ptr, softcap, scale, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """(logit, d logit / d raw product) of the raw product z; -inf beyond the vocabulary"""
    if HAS_BIAS:
        z += tl.load(bias_ptr + v, mask=in_v, other=0.0).to(tl.float32)
    z *= scale
    slope = scale
    if HAS_SOFTCAP:
        # c tanh(z / c) = z tanh(x) / x with x = |z| / c: a cap far above the logit does not change it
        x = tl.abs(z) / softcap
        u = x * x
        # for a small x, a polynomial in x^2 whose largest error is 3e-9
        near_zero = 1.0 + u * (-0.33333327 + u * (0.13332961 + u * (-0.05389886 + u * (0.02129668 + u * -0.0066456))))
        # for the others, from exp(-2 x), which cannot overflow; near zero 1 - e would cancel
        e = tl.exp(-2.0 * x)
        z *= tl.where(u < 0.25, near_zero, (1.0 - e) / ((1.0 + e) * x))
        slope = scale * (4.0 * e / ((1.0 + e) * (1.0 + e)))  # 1 - tanh^2 x, without cancellation
    return tl.where(in_v, z, float("-inf")), slope


@triton.jit
def linear_logprob_pass_kernel(
    product_ptr,
    gradient_ptr,
    target_ptr,
    bias_ptr,
    logprob_ptr,
    softcap,
    scale,
    V,
    product_stride,
    gradient_stride,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NEED_GRAD: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """logprob[n] = z[n, y] - log sum_v exp z[n, v], with z the logits of the raw products and y the target; and
    d logprob[n] / d product[n, v] = slope * ((v == y) - exp(z[n, v] - log sum)), written over the products themselves

    The gradient may be half as wide as the products. Then its tile lies in memory that has been read already.
    """
    row = tl.program_id(0).to(tl.int64)
    product_ptr += row * product_stride
    gradient_ptr += row * gradient_stride
    target = tl.load(target_ptr + row)
    v = tl.arange(0, BLOCK_V)
    # each lane keeps a maximum and a sum of its own; they are put together once, at the end
    peak = tl.full((BLOCK_V,), -1.0e38, tl.float32)
    total = tl.zeros((BLOCK_V,), tl.float32)
    z_target = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(0, V, BLOCK_V):
        column = start + v
        z = tl.load(product_ptr + column, mask=column < V, other=0.0)
        z, _ = _logit(z, column, column < V, bias_ptr, softcap, scale, HAS_BIAS, HAS_SOFTCAP)
        new_peak = tl.maximum(peak, z)
        total = total * tl.exp(peak - new_peak) + tl.exp(z - new_peak)
        peak = new_peak
        z_target = tl.where(column == target, z, z_target)
    row_peak = tl.max(peak, axis=0)
    log_total = tl.log(tl.sum(total * tl.exp(peak - row_peak), axis=0))
    known = (target >= 0) & (target < V)
    # the peak is taken away first: target and peak may be large, but their difference is not
    logprob = (tl.sum(z_target, axis=0) - row_peak) - log_total
    tl.store(logprob_ptr + row, tl.where(known, logprob, float("nan")))
    if NEED_GRAD:
        for start in range(0, V, BLOCK_V):
            column = start + v
            z = tl.load(product_ptr + column, mask=column < V, other=0.0)
            z, slope = _logit(z, column, column < V, bias_ptr, softcap, scale, HAS_BIAS, HAS_SOFTCAP)
            # in fp32, because the target's entry is 1 - p, and it would lose p if p were rounded first
            gradient = slope * (tl.where(column == target, 1.0, 0.0) - tl.exp((z - row_peak) - log_total))
            tl.debug_barrier()  # the whole tile is read before any of it is written
            tl.store(gradient_ptr + column, gradient.to(gradient_ptr.dtype.element_ty), mask=column < V)


@on_its_device
def logprob_pass(
    products: Tensor,
    target: Tensor,
    bias: Tensor | None,
    logit_softcap: float | None,
    logit_scale: float,
    gradient_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:
    """`torch_ops.logprob_pass` in one launch. `products` has packed rows, and the gradient lies in their memory."""
    assert products.stride(1) == 1 or products.shape[1] == 1
    N, V = products.shape
    logprob = products.new_empty(N)
    gradient = None if gradient_dtype is None else products.view(gradient_dtype)[:, :V]
    if N == 0:
        return logprob, gradient
    stand_in = products  # the kernel does not follow this pointer
    linear_logprob_pass_kernel[(N,)](
        products,
        stand_in if gradient is None else gradient,
        target.contiguous(),
        stand_in if bias is None else bias.contiguous(),
        logprob,
        0.0 if logit_softcap is None else logit_softcap,
        logit_scale,
        V,
        products.stride(0),
        0 if gradient is None else gradient.stride(0),
        HAS_BIAS=bias is not None,
        HAS_SOFTCAP=logit_softcap is not None,
        NEED_GRAD=gradient is not None,
        BLOCK_V=min(_BLOCK_V, triton.next_power_of_2(V)),
        num_warps=_NUM_WARPS,
    )
    return logprob, gradient
