"""The head's first matrix product with an epilogue: it writes what the second product reads, and no logits exist.

Nobody has measured it on a GPU, so `head_chunks.PRODUCT_WITH_EPILOGUE` keeps it off.

With z the logits of a row, y its target and any c:

    E_v = exp(z_v - c) for v != y,  E_y = 0,  S = sum_v E_v
    logprob = (z_y - c) - log(exp(z_y - c) + S)
    d logprob / d h = scale (slope_y S w_y - sum_v slope_v E_v w_v) / (exp(z_y - c) + S) = a w_y - b (E W)

Stored are E with the slopes of the soft cap in it, a and b. At first c = z_y, which is one dot product a row. Where an
exponential would leave its range, c becomes the largest logit of the row, and the product of that block of rows is done
again. The device alone decides that: the second launch always happens, and without such a row it ends at once. Sums of
tiles are stored side by side and then added up in their order, so two runs are bitwise equal.

What it could gain, by arithmetic, for 8192 rows, D = 1536 and V = 151936 in bf16: a product has 3.8e12 operations, and
both ways have two of them. Beside these, the way over logits writes 5.0 GB of logits in fp32, reads them, and writes
2.5 GB of E. This way only writes E. But an epilogue stands between two products of a tile. As compiled for sm_90 it has
about 1,500 instructions a thread, so 3,000 cycles for 8 warps on 4 schedulers, and the product of a tile of 128 x 256
takes at least 24,576 cycles (4,096 operations a cycle). So an eighth is added to the first product, where the way over
logits adds 7.5 GB of traffic. What else a product in Triton loses against the vendor's is to be measured.

What rounding changes in the sum of E is not made up for. To add up what is stored would take single conversions in
place of packed ones, and these are as slow as the exponentials.

Layout: N rows, V vocabulary, D hidden size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from renyi_kernels.triton_ops.device import architecture, multiprocessors, on_its_device
from renyi_kernels.triton_ops.linear_logprob import RANGES, _from_sums, _logit
from renyi_kernels.triton_ops.tuning import head_blocks

# blocks of rows that share the blocks of the vocabulary which are in the cache
_GROUP = 16
_BLOCK = 1024  # of the passes with a program for each row
_WITH_TMA = ("sm_90", "sm_100")


@triton.jit
def linear_logprob_gemm_target_kernel(
    hidden_ptr,
    weight_ptr,
    target_ptr,
    bias_ptr,
    z_y_ptr,
    slope_y_ptr,
    c_ptr,
    softcap,
    scale,
    V,
    D,
    hidden_stride,
    weight_stride,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """z[n, y], the slope of the soft cap there, and the first c[n]: z[n, y] too, or 0 where y is no token"""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    known = (target >= 0) & (target < V)
    hidden_ptr += row * hidden_stride
    weight_ptr += tl.where(known, target, 0) * weight_stride
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        h = tl.load(hidden_ptr + d, mask=d < D, other=0.0).to(tl.float32)
        total += h * tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    product = tl.sum(total, axis=0)
    if HAS_BIAS:
        product += tl.load(bias_ptr + target, mask=known, other=0.0).to(tl.float32)
    z, slope = _logit(product * scale, target, known, bias_ptr, softcap, 1.0, False, HAS_SOFTCAP)
    tl.store(z_y_ptr + row, tl.where(known, z, float("nan")))
    tl.store(slope_y_ptr + row, slope)
    tl.store(c_ptr + row, tl.where(known, z, 0.0))


@triton.jit
def _rows_of(matrix, first, rows, start, D, stride, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr):
    """The tile [ROWS, BLOCK_D] of a matrix [rows, D] at (first, start): 0 beyond D, anything beyond the last row"""
    if TMA:
        tile = matrix.load([first, start])
    else:
        row = tl.minimum(first + tl.arange(0, ROWS), rows - 1).to(tl.int64)
        d = start + tl.arange(0, BLOCK_D)
        tile = tl.load(matrix + (row[:, None] * stride + d[None, :]), mask=(d < D)[None, :], other=0.0)
    return tile


@triton.jit
def linear_logprob_gemm_kernel(
    hidden,
    weight,
    E,
    target_ptr,
    bias_ptr,
    c_ptr,
    again_ptr,
    S_ptr,
    top_ptr,
    softcap,
    scale,
    N,
    V,
    D,
    hidden_stride,
    weight_stride,
    E_stride,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NEED_GRAD: tl.constexpr,
    FACTOR: tl.constexpr,
    AGAIN: tl.constexpr,
    TMA: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """For v other than the target, with z the logits of h W^T:

        E[n, v] = FACTOR slope[n, v] exp(z[n, v] - c[n])

    and, for the columns v of each tile, S = sum exp(z[n, v] - c[n]) and top = max z[n, v] - c[n]. AGAIN does only the
    blocks of rows that are marked. With TMA, `hidden`, `weight` and `E` are tensor descriptors.
    """
    num_n = tl.cdiv(N, BLOCK_N)
    num_v = tl.cdiv(V, BLOCK_V)
    num_d = tl.cdiv(D, BLOCK_D)
    tl.assume(num_d > 0)  # or the compiler would make a second loop for products of no step
    for tile in tl.range(tl.program_id(0), num_n * num_v, tl.num_programs(0), flatten=TMA and not AGAIN):
        # blocks of rows take turns, a group of them at a time, so that they find the vocabulary's block in the cache
        group = tile // (GROUP * num_v) * GROUP
        in_group = min(num_n - group, GROUP)
        place = tile % (GROUP * num_v)
        n_tile = group + place % in_group
        v_tile = place // in_group
        if not AGAIN or tl.load(again_ptr + n_tile) != 0:
            first_n = n_tile * BLOCK_N
            first_v = v_tile * BLOCK_V
            product = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
            for step in range(num_d):
                start = step * BLOCK_D
                h = _rows_of(hidden, first_n, N, start, D, hidden_stride, BLOCK_N, BLOCK_D, TMA)
                w = _rows_of(weight, first_v, V, start, D, weight_stride, BLOCK_V, BLOCK_D, TMA)
                product = tl.dot(h, w.T, product, input_precision="ieee")
            n = first_n + tl.arange(0, BLOCK_N)
            v = first_v + tl.arange(0, BLOCK_V)
            in_n, in_v = n < N, v < V
            # a target may be anything: beyond the vocabulary it hides no column
            target = tl.load(target_ptr + n, mask=in_n, other=0).to(tl.int32)
            c = tl.load(c_ptr + n, mask=in_n, other=0.0)
            if HAS_BIAS:
                product += tl.load(bias_ptr + v, mask=in_v, other=0.0).to(tl.float32)[None, :]
            z, slope = _logit(product * scale, v, True, bias_ptr, softcap, 1.0, False, HAS_SOFTCAP)
            z = tl.where(in_v[None, :] & (v[None, :] != target[:, None]), z - c[:, None], float("-inf"))
            e = tl.exp(z)
            part = tl.cast(n, tl.int64) * num_v + v_tile
            tl.store(S_ptr + part, tl.sum(e, axis=1), mask=in_n)
            tl.store(top_ptr + part, tl.max(z, axis=1), mask=in_n)
            if NEED_GRAD:
                if HAS_SOFTCAP:
                    e *= slope
                e *= FACTOR
                if TMA:
                    E.store([first_n, first_v], e.to(E.dtype))
                else:
                    pointers = E + (tl.cast(n, tl.int64)[:, None] * E_stride + v[None, :])
                    tl.store(pointers, e.to(E.dtype.element_ty), mask=in_n[:, None] & in_v[None, :])


@triton.jit
def linear_logprob_gemm_range_kernel(
    top_ptr, c_ptr, again_ptr, largest, num_parts, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr
):
    """Where the largest exponent of a row is beyond `largest`, it is added to c, and the row's block is marked"""
    row = tl.program_id(0).to(tl.int64)
    top_ptr += row * num_parts
    tops = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, num_parts, BLOCK):
        part = start + tl.arange(0, BLOCK)
        tops = tl.maximum(tops, tl.load(top_ptr + part, mask=part < num_parts, other=float("-inf")))
    top = tl.max(tops, axis=0)
    if top > largest:
        tl.store(c_ptr + row, tl.load(c_ptr + row) + top)
        tl.store(again_ptr + row // BLOCK_N, 1)


@triton.jit
def linear_logprob_gemm_sum_kernel(
    S_ptr,
    z_y_ptr,
    slope_y_ptr,
    c_ptr,
    logprob_ptr,
    a_ptr,
    b_ptr,
    scale,
    num_parts,
    NEED_GRAD: tl.constexpr,
    FACTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The parts of a row's sums, added up in their order; logprob, a and b from these"""
    row = tl.program_id(0).to(tl.int64)
    S = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, num_parts, BLOCK):
        part = start + tl.arange(0, BLOCK)
        S += tl.load(S_ptr + row * num_parts + part, mask=part < num_parts, other=0.0)
    z_y = tl.load(z_y_ptr + row)
    logprob, a, b = _from_sums(
        tl.sum(S, axis=0),
        z_y - tl.load(c_ptr + row),
        tl.load(slope_y_ptr + row),
        0.0,
        scale,
        FACTOR,
    )
    known = z_y == z_y
    tl.store(logprob_ptr + row, logprob)
    if NEED_GRAD:
        tl.store(a_ptr + row, tl.where(known, a, 0.0))
        tl.store(b_ptr + row, tl.where(known, b, 0.0))


@on_its_device
def logprob_product(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    logit_softcap: float | None,
    logit_scale: float,
    E: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The product h W^T [N, V] and `logprob_pass` of it, without the product: (logprob [N], a [N], b [N]), and E.

    The entries of a row of `hidden`, `weight` and E lie next to each other.
    """
    (N, D), V = hidden.shape, weight.shape[0]
    need_grad = E is not None
    z_y, slope_y, c, logprob, a, b = hidden.new_empty((6, N), dtype=torch.float32)
    if N == 0:
        return logprob, a if need_grad else None, b if need_grad else None
    arch = architecture(hidden.device)
    aligned = all(x is None or _is_aligned(x) for x in (hidden, weight, E))
    tma = aligned and arch in _WITH_TMA
    sizes, options = head_blocks(hidden.dtype.itemsize, arch, aligned and logit_softcap is None)
    block_n, block_v, block_d = sizes["BLOCK_N"], sizes["BLOCK_V"], sizes["BLOCK_D"]
    num_n, num_v = triton.cdiv(N, block_n), triton.cdiv(V, block_v)
    S, top = hidden.new_empty((2, N, num_v), dtype=torch.float32)
    again = torch.zeros(num_n, dtype=torch.int32, device=hidden.device)
    target, stand_in = target.contiguous(), logprob  # no kernel follows the pointer of a stand-in
    bias = stand_in if bias is None else bias.contiguous()
    softcap = 0.0 if logit_softcap is None else logit_softcap
    factor, largest = RANGES[hidden.dtype]
    head = {"HAS_BIAS": bias is not stand_in, "HAS_SOFTCAP": logit_softcap is not None}
    linear_logprob_gemm_target_kernel[(N,)](
        hidden,
        weight,
        target,
        bias,
        z_y,
        slope_y,
        c,
        softcap,
        logit_scale,
        V,
        D,
        hidden.stride(0),
        weight.stride(0),
        BLOCK=_BLOCK,
        **head,
    )
    describe = lambda x, *block: TensorDescriptor.from_tensor(x, list(block)) if tma else x
    matrices = (
        describe(hidden, block_n, block_d),
        describe(weight, block_v, block_d),
        stand_in if E is None else describe(E, block_n, block_v),
    )

    def product(again_only: bool) -> None:
        linear_logprob_gemm_kernel[(min(multiprocessors(hidden.device), num_n * num_v),)](
            *matrices,
            target,
            bias,
            c,
            again,
            S,
            top,
            softcap,
            logit_scale,
            N,
            V,
            D,
            hidden.stride(0),
            weight.stride(0),
            0 if E is None else E.stride(0),
            NEED_GRAD=need_grad,
            FACTOR=factor,
            AGAIN=again_only,
            TMA=tma,
            GROUP=_GROUP,
            **head,
            **sizes,
            **options,
        )

    product(again_only=False)
    linear_logprob_gemm_range_kernel[(N,)](top, c, again, largest, num_v, BLOCK_N=block_n, BLOCK=_BLOCK)
    product(again_only=True)
    linear_logprob_gemm_sum_kernel[(N,)](
        S, z_y, slope_y, c, logprob, a, b, logit_scale, num_v, NEED_GRAD=need_grad, FACTOR=factor, BLOCK=_BLOCK
    )
    return logprob, a if need_grad else None, b if need_grad else None


def _is_aligned(matrix: Tensor) -> bool:
    """Whether every row starts at a multiple of 16 bytes. The copy engine takes no others."""
    return matrix.data_ptr() % 16 == 0 and matrix.stride(0) * matrix.element_size() % 16 == 0
