"""The Triton kernels beside the two matrix products of linear_logprob, and their launchers.

Layout: N rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from renyi_kernels.triton_ops.device import on_its_device

_BLOCK_V = 2048
_NUM_WARPS = 8
_BLOCK_D = 1024
# By dtype of E: the factor it is stored with, and by how many nats a logit may exceed the target's if it is stored
# relative to that. E in bf16 has the range of fp32: it holds exp(44), and so do its sums. For fp16 a factor moves E to
# the middle of a small range: 64 exp(6.5) is below 65504
RANGES = {torch.bfloat16: (1.0, 44.0), torch.float32: (1.0, 44.0), torch.float16: (64.0, 6.5)}


@triton.jit
def _logit(z, v, there, bias_ptr, softcap, scale, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """(logit, derivative of its soft cap) of the raw product z; -inf where nothing is there"""
    if HAS_BIAS:
        z += tl.load(bias_ptr + v, mask=there, other=0.0).to(tl.float32)
    z *= scale
    slope = 1.0
    if HAS_SOFTCAP:
        # c tanh(z / c) = z tanh(x) / x with x = |z| / c: a cap far above the logit does not change it
        x = tl.abs(z) / softcap
        u = x * x
        # for a small x, a polynomial in x^2 whose largest error is 3e-9
        near_zero = 1.0 + u * (-0.33333327 + u * (0.13332961 + u * (-0.05389886 + u * (0.02129668 + u * -0.0066456))))
        # for the others, from exp(-2 x), which cannot overflow; near zero 1 - e would cancel
        e = tl.exp(-2.0 * x)
        z *= tl.where(u < 0.25, near_zero, (1.0 - e) / ((1.0 + e) * x))
        slope = 4.0 * e / ((1.0 + e) * (1.0 + e))  # 1 - tanh^2 x, without cancellation
    return tl.where(there, z, float("-inf")), slope


@triton.jit
def _write_relative(
    c,
    product_ptr,
    E_ptr,
    y,
    bias_ptr,
    softcap,
    scale,
    V,
    FACTOR: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NEED_GRAD: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """E_v = FACTOR slope_v exp(z_v - c) for v != y, and E_y = 0. Returns (S = sum of exp(z_v - c) over v != y, the
    largest z_v of v != y, by how much rounding has changed the sum of E / FACTOR)"""
    # each lane keeps sums and a maximum of its own; they are put together once, at the end
    v = tl.arange(0, BLOCK_V)
    S = tl.zeros((BLOCK_V,), tl.float32)
    top = tl.full((BLOCK_V,), float("-inf"), tl.float32)
    rounding = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(0, V, BLOCK_V):
        column = start + v
        in_v = column < V
        z = tl.load(product_ptr + column, mask=in_v, other=0.0)
        z, slope = _logit(z, column, in_v & (column != y), bias_ptr, softcap, scale, HAS_BIAS, HAS_SOFTCAP)
        top = tl.maximum(top, z)
        e = tl.exp(z - c)
        S += e
        if NEED_GRAD:
            exact = FACTOR * slope * e
            stored = exact.to(E_ptr.dtype.element_ty)
            if E_ptr.dtype.element_ty != tl.float32:
                rounding += stored.to(tl.float32) - exact
            tl.store(E_ptr + column, stored, mask=in_v)
    return tl.sum(S, axis=0), tl.max(top, axis=0), tl.sum(rounding, axis=0) / FACTOR


@triton.jit
def _from_sums(S, z_y, slope_y, rounding, scale, FACTOR: tl.constexpr):
    """(logprob, a, b), with z_y relative to c. `rounding`: by how much rounding has changed the sum of E / FACTOR"""
    e_y = tl.exp(z_y)
    x = (e_y - 1.0) + S
    u = 1.0 + x
    # log1p(x) = log(u) x / (u - 1), with u = 1 + x as it is rounded: it keeps the digits of a small x
    log1p = tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))
    factor = scale / (e_y + S)
    return z_y - log1p, factor * (slope_y * S + rounding), factor / FACTOR


@triton.jit
def linear_logprob_pass_kernel(
    product_ptr,
    E_ptr,
    target_ptr,
    bias_ptr,
    logprob_ptr,
    a_ptr,
    b_ptr,
    softcap,
    scale,
    V,
    product_stride,
    E_stride,
    FACTOR: tl.constexpr,
    LARGEST: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NEED_GRAD: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """With z the logits of the raw products, y the target and any c: E_v = exp(z_v - c) for v != y, E_y = 0 and
    S = sum_v E_v give

        logprob = (z_y - c) - log(exp(z_y - c) + S)
        d logprob / d h = scale (slope_y S w_y - sum_v slope_v E_v w_v) / (exp(z_y - c) + S) = a w_y - b (E W)

    Stored are E with the slopes in it, a and b. c is the target's logit z_y, so one reading is enough. A row with a
    logit so far above it that E would not fit is read again, with the largest logit as c.

    Rows w_v of a head have much in common. So what rounding has changed in the sum of E goes to the coefficient of
    w_y too: then errors of rounding multiply only the differences w_y - w_v.
    """
    row = tl.program_id(0).to(tl.int64)
    product_ptr += row * product_stride
    E_ptr += row * E_stride
    target = tl.load(target_ptr + row)
    known = (target >= 0) & (target < V)
    y = tl.where(known, target, -1).to(tl.int32)
    z_y = tl.load(product_ptr + y, mask=known, other=0.0)
    c, _ = _logit(z_y, y, known, bias_ptr, softcap, scale, HAS_BIAS, HAS_SOFTCAP)
    S, top, rounding = _write_relative(
        c, product_ptr, E_ptr, y, bias_ptr, softcap, scale, V, FACTOR, HAS_BIAS, HAS_SOFTCAP, NEED_GRAD, BLOCK_V
    )
    if top - c > LARGEST:
        c = top
        S, top, rounding = _write_relative(
            c, product_ptr, E_ptr, y, bias_ptr, softcap, scale, V, FACTOR, HAS_BIAS, HAS_SOFTCAP, NEED_GRAD, BLOCK_V
        )
    # computed again: registers that kept it through the reading would be spilled
    z_y, slope_y = _logit(z_y, y, known, bias_ptr, softcap, scale, HAS_BIAS, HAS_SOFTCAP)
    logprob, a, b = _from_sums(S, z_y - c, slope_y, rounding, scale, FACTOR)
    tl.store(logprob_ptr + row, tl.where(known, logprob, float("nan")))
    if NEED_GRAD:
        tl.store(a_ptr + row, tl.where(known, a, 0.0))
        tl.store(b_ptr + row, tl.where(known, b, 0.0))


@triton.jit
def linear_logprob_gradient_kernel(
    P_ptr,
    weight_ptr,
    target_ptr,
    a_ptr,
    b_ptr,
    G_ptr,
    V,
    D,
    P_stride,
    weight_stride_v,
    weight_stride_d,
    G_stride,
    BLOCK_D: tl.constexpr,
):
    """G[n, d] = a[n] weight[y[n], d] - b[n] P[n, d]; of an unknown target there is no row"""
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = d < D
    target = tl.load(target_ptr + row)
    known = (target >= 0) & (target < V)
    w = tl.load(weight_ptr + target * weight_stride_v + d.to(tl.int64) * weight_stride_d, mask=in_d & known, other=0.0)
    P = tl.load(P_ptr + row * P_stride + d, mask=in_d)
    G = tl.load(a_ptr + row) * w.to(tl.float32) - tl.load(b_ptr + row) * P
    tl.store(G_ptr + row * G_stride + d, G.to(G_ptr.dtype.element_ty), mask=in_d)


@on_its_device
def logprob_pass(
    products: Tensor,
    target: Tensor,
    bias: Tensor | None,
    logit_softcap: float | None,
    logit_scale: float,
    E: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`torch_ops.logprob_pass` in one launch. E is a tensor of its own, so that a row can be read twice, and there is
    always an a. The entries of a row of `products` and of E lie next to each other."""
    N, V = products.shape
    assert V == 1 or (products.stride(1) == 1 and (E is None or E.stride(1) == 1))
    logprob = products.new_empty(N)
    a, b = (None, None) if E is None else (torch.empty_like(logprob), torch.empty_like(logprob))
    if N == 0:
        return logprob, a, b
    factor, largest = RANGES[products.dtype if E is None else E.dtype]
    stand_in = products  # the kernel does not follow this pointer
    linear_logprob_pass_kernel[(N,)](
        products,
        stand_in if E is None else E,
        target.contiguous(),
        stand_in if bias is None else bias.contiguous(),
        logprob,
        stand_in if a is None else a,
        stand_in if b is None else b,
        0.0 if logit_softcap is None else logit_softcap,
        logit_scale,
        V,
        products.stride(0),
        0 if E is None else E.stride(0),
        FACTOR=factor,
        LARGEST=largest,
        HAS_BIAS=bias is not None,
        HAS_SOFTCAP=logit_softcap is not None,
        NEED_GRAD=E is not None,
        BLOCK_V=min(_BLOCK_V, triton.next_power_of_2(V)),
        num_warps=_NUM_WARPS,
    )
    return logprob, a, b


@on_its_device
def gradient_pass(P: Tensor, weight: Tensor, target: Tensor, a: Tensor, b: Tensor, out: Tensor) -> None:
    """`torch_ops.gradient_pass` in one launch. The entries of a row of P and of `out` lie next to each other."""
    N, D = P.shape
    assert D == 1 or P.stride(1) == out.stride(1) == 1
    if N == 0:
        return
    block = min(_BLOCK_D, triton.next_power_of_2(D))
    linear_logprob_gradient_kernel[(N, triton.cdiv(D, block))](
        P,
        weight,
        target.contiguous(),
        a,
        b,
        out,
        len(weight),
        D,
        P.stride(0),
        weight.stride(0),
        weight.stride(1),
        out.stride(0),
        BLOCK_D=block,
    )
