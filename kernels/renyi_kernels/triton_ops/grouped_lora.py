"""Triton kernels of the low-rank products over particles, and their launchers.

Four passes make every forward and backward (each kernel states its equation); `lora_products.py` puts them together.
All of them sum in fp32 and in a fixed order, so two runs are bitwise equal: where several programs add to one result,
each writes a partial sum of its own, and another pass adds these up.

Offsets to the start of a tile have 64 bits. Offsets within a tile have 32, which takes fewer registers. If these could
pass 2^31 elements, the launcher sets FAR, and they have 64 bits too.

Layout: K particles, M rows, I/O in/out features, R rank. An input that all particles share is [1, M, I].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from renyi_kernels.triton_ops.device import on_its_device, programs_wanted
from renyi_kernels.triton_ops.tuning import blocks


@triton.jit
def _wide(index, FAR: tl.constexpr):
    """The index, in 64 bits if FAR. Then every offset that is computed from it has 64 bits too."""
    return tl.cast(index, tl.int64) if FAR else index


@triton.jit
def grouped_lora_shrink_kernel(
    x_ptr,
    A_ptr,
    S_ptr,
    M,
    R,
    I,
    x_stride_k,
    x_stride_m,
    A_stride_k,
    A_stride_r,
    S_stride_k,
    S_stride_m,
    FAR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """S[k, m, r] = sum_i x[k, m, i] A[k, r, i]"""
    k = tl.program_id(2).to(tl.int64)
    first_m = tl.program_id(0).to(tl.int64) * BLOCK_M
    m = _wide(tl.arange(0, BLOCK_M), FAR)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    i = tl.arange(0, BLOCK_I)
    in_m = m < M - first_m
    in_r = r < R
    x_ptrs = x_ptr + k * x_stride_k + first_m * x_stride_m + (m[:, None] * x_stride_m + i[None, :])
    A_ptrs = A_ptr + k * A_stride_k + (_wide(r, FAR)[None, :] * A_stride_r + i[:, None])
    S = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(0, I, BLOCK_I):
        in_i = i < I - start
        x = tl.load(x_ptrs + start, mask=in_m[:, None] & in_i[None, :], other=0.0)
        A = tl.load(A_ptrs + start, mask=in_i[:, None] & in_r[None, :], other=0.0)
        S = tl.dot(x, A, S, input_precision="ieee")
    S_ptrs = S_ptr + k * S_stride_k + first_m * S_stride_m + (m[:, None] * S_stride_m + r[None, :])
    tl.store(S_ptrs, S.to(S_ptr.dtype.element_ty), mask=in_m[:, None] & in_r[None, :])


@triton.jit
def grouped_lora_expand_kernel(
    S_ptr,
    B_ptr,
    base_ptr,
    out_ptr,
    scaling,
    M,
    R,
    O,
    S_stride_k,
    S_stride_m,
    B_stride_k,
    B_stride_o,
    B_stride_r,
    base_stride_k,
    base_stride_m,
    out_stride_k,
    out_stride_m,
    HAS_BASE: tl.constexpr,
    FAR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out[k, m, o] = base[k, m, o] + scaling * sum_r S[k, m, r] B[k, o, r]; `base` may be `out` itself"""
    k = tl.program_id(2).to(tl.int64)
    first_m = tl.program_id(0).to(tl.int64) * BLOCK_M
    o = _wide(tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O), FAR)
    m = _wide(tl.arange(0, BLOCK_M), FAR)
    r = _wide(tl.arange(0, BLOCK_R), FAR)
    in_m = m < M - first_m
    in_o = o < O
    S_ptrs = S_ptr + k * S_stride_k + first_m * S_stride_m + (m[:, None] * S_stride_m + r[None, :])
    B_ptrs = B_ptr + k * B_stride_k + (o[None, :] * B_stride_o + r[:, None] * B_stride_r)
    update = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
    for start in range(0, R, BLOCK_R):
        in_r = r < R - start
        S = tl.load(S_ptrs + start, mask=in_m[:, None] & in_r[None, :], other=0.0)
        B = tl.load(B_ptrs + _wide(start, FAR) * B_stride_r, mask=in_r[:, None] & in_o[None, :], other=0.0)
        update = tl.dot(S, B, update, input_precision="ieee")
    update *= scaling
    inside = in_m[:, None] & in_o[None, :]
    if HAS_BASE:
        base_ptrs = base_ptr + k * base_stride_k + first_m * base_stride_m + (m[:, None] * base_stride_m + o[None, :])
        update += tl.load(base_ptrs, mask=inside, other=0.0).to(tl.float32)
    out_ptrs = out_ptr + k * out_stride_k + first_m * out_stride_m + (m[:, None] * out_stride_m + o[None, :])
    tl.store(out_ptrs, update.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def grouped_lora_up_backward_kernel(
    dY_ptr,
    S_ptr,
    B_ptr,
    dS_ptr,
    dB_ptr,
    scaling,
    M,
    R,
    O,
    O_PER_SPLIT,
    num_r_blocks,
    dY_stride_k,
    dY_stride_m,
    S_stride_k,
    S_stride_m,
    B_stride_k,
    B_stride_o,
    dS_stride_split,
    dS_stride_k,
    dS_stride_m,
    dB_stride_part,
    dB_stride_k,
    FAR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Reads dY once and computes both

    dS[k, m, r] = scaling * sum_o dY[k, m, o] B[k, o, r]      (a partial sum over o of one split)
    dB[k, o, r] = scaling * sum_m dY[k, m, o] S[k, m, r]      (a partial sum over m of one block)
    """
    k = tl.program_id(2).to(tl.int64)
    part = tl.program_id(0).to(tl.int64)
    split = (tl.program_id(1) // num_r_blocks).to(tl.int64)
    first_m = part * BLOCK_M
    first_o = split * O_PER_SPLIT
    m = _wide(tl.arange(0, BLOCK_M), FAR)
    o = _wide(tl.arange(0, BLOCK_O), FAR)
    r = (tl.program_id(1) % num_r_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_m = m < M - first_m
    in_r = r < R
    dY_ptrs = dY_ptr + k * dY_stride_k + first_m * dY_stride_m + first_o + (m[:, None] * dY_stride_m + o[None, :])
    B_ptrs = B_ptr + k * B_stride_k + first_o * B_stride_o + (o[:, None] * B_stride_o + r[None, :])
    dB_ptrs = dB_ptr + part * dB_stride_part + k * dB_stride_k + first_o * R + (o[:, None] * R + r[None, :])
    S_ptrs = S_ptr + k * S_stride_k + first_m * S_stride_m + (m[:, None] * S_stride_m + r[None, :])
    S = tl.load(S_ptrs, mask=in_m[:, None] & in_r[None, :], other=0.0)
    dS = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(0, tl.minimum(O_PER_SPLIT, O - first_o), BLOCK_O):
        in_o = o < tl.minimum(O_PER_SPLIT, O - first_o) - start
        dY = tl.load(dY_ptrs + start, mask=in_m[:, None] & in_o[None, :], other=0.0)
        B = tl.load(B_ptrs + _wide(start, FAR) * B_stride_o, mask=in_o[:, None] & in_r[None, :], other=0.0)
        dS = tl.dot(dY, B, dS, input_precision="ieee")
        dB = tl.dot(tl.trans(dY), S, input_precision="ieee")
        tl.store(dB_ptrs + _wide(start, FAR) * R, dB * scaling, mask=in_o[:, None] & in_r[None, :])
    dS_ptrs = dS_ptr + split * dS_stride_split + k * dS_stride_k + first_m * dS_stride_m
    dS_ptrs += m[:, None] * dS_stride_m + r[None, :]
    tl.store(dS_ptrs, (dS * scaling).to(dS_ptr.dtype.element_ty), mask=in_m[:, None] & in_r[None, :])


@triton.jit
def grouped_lora_down_backward_kernel(
    x_ptr,
    dS_ptr,
    dA_ptr,
    M,
    R,
    I,
    M_PER_SPLIT,
    num_r_blocks,
    x_stride_k,
    x_stride_m,
    dS_stride_k,
    dS_stride_m,
    dA_stride_split,
    dA_stride_k,
    FAR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """dA[k, r, i] = sum_m dS[k, m, r] x[k, m, i]      (a partial sum over m of one split)"""
    k = tl.program_id(2).to(tl.int64)
    split = (tl.program_id(1) // num_r_blocks).to(tl.int64)
    first_m = split * M_PER_SPLIT
    m = _wide(tl.arange(0, BLOCK_M), FAR)
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    r = (tl.program_id(1) % num_r_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_i = i < I
    in_r = r < R
    num_m = tl.minimum(M_PER_SPLIT, M - first_m)
    x_ptrs = x_ptr + k * x_stride_k + first_m * x_stride_m + (m[:, None] * x_stride_m + i[None, :])
    dS_ptrs = dS_ptr + k * dS_stride_k + first_m * dS_stride_m + (m[:, None] * dS_stride_m + r[None, :])
    dA = tl.zeros((BLOCK_I, BLOCK_R), tl.float32)
    for start in range(0, num_m, BLOCK_M):
        in_m = m < num_m - start
        x = tl.load(x_ptrs, mask=in_m[:, None] & in_i[None, :], other=0.0)
        dS = tl.load(dS_ptrs, mask=in_m[:, None] & in_r[None, :], other=0.0)
        # transposed, because matrix units need the wide side first
        dA = tl.dot(tl.trans(x), dS, dA, input_precision="ieee")
        # in steps, because a split can span more than 2^31 elements
        x_ptrs += _wide(BLOCK_M, FAR) * x_stride_m
        dS_ptrs += _wide(BLOCK_M, FAR) * dS_stride_m
    dA_ptrs = dA_ptr + split * dA_stride_split + k * dA_stride_k + (r[None, :].to(tl.int64) * I + i[:, None])
    tl.store(dA_ptrs, dA.to(dA_ptr.dtype.element_ty), mask=in_i[:, None] & in_r[None, :])


# Launchers. Their inputs may have any strides. `S` of `shrink` and `out` of `expand` have to be packed


@on_its_device
def shrink(x: Tensor, A: Tensor, S: Tensor) -> None:
    """S [K, M, R] = x A_k^T for x [K, M, I]."""
    assert _is_packed(S)
    (K, M, I), R = x.shape, A.shape[1]
    if S.numel() == 0:
        return
    x, A = _packed(x), _packed(A)
    config, options = blocks("shrink", x, R)
    grid = (triton.cdiv(M, config["BLOCK_M"]), triton.cdiv(R, config["BLOCK_R"]), K)
    far = _far(config["BLOCK_M"] * max(x.stride(1), S.stride(1)), R * A.stride(1))
    if far:
        options["num_warps"] = 8  # on an sm_80 the registers of 4 warps cannot hold offsets of 64 bits
    strides = (*x.stride()[:2], *A.stride()[:2], *S.stride()[:2])
    grouped_lora_shrink_kernel[grid](x, A, S, M, R, I, *strides, FAR=far, **config, **options)


@on_its_device
def expand(S: Tensor, B: Tensor, scaling: float, base: Tensor | None, out: Tensor) -> None:
    """out [K, M, O] = base + scaling * S B_k^T; `base` [K or 1, M, O] may be `out`; B [K, O, R]."""
    assert _is_packed(out)
    (K, M, R), O = S.shape, B.shape[1]
    if out.numel() == 0:
        return
    S, has_base = _packed(S), base is not None
    base = out if base is None else _packed(base)
    config, options = blocks("expand", S, R)
    grid = (triton.cdiv(M, config["BLOCK_M"]), triton.cdiv(O, config["BLOCK_O"]), K)
    far = _far(config["BLOCK_M"] * max(S.stride(1), base.stride(1), out.stride(1)), O * B.stride(1), R * B.stride(2))
    base_strides = (base.stride(0) if base.shape[0] == K else 0, base.stride(1)) if has_base else (0, 0)
    strides = (*S.stride()[:2], *B.stride(), *base_strides, *out.stride()[:2])
    grouped_lora_expand_kernel[grid](
        S, B, base, out, scaling, M, R, O, *strides, HAS_BASE=has_base, FAR=far, **config, **options
    )


@on_its_device
def up_backward(dY: Tensor, S: Tensor, B: Tensor, scaling: float, dS: Tensor, dB: Tensor, add: bool) -> None:
    """dS [K, M, R] = scaling * dY B_k and dB [K, O, R] = scaling * dY^T S, of dY [K, M, O]. `add`: to what dB holds."""
    (K, M, O), R = dY.shape, S.shape[2]
    if dY.numel() == 0:
        dS.zero_()
        if not add:
            dB.zero_()
        return
    dY, S, B = _packed(dY), _packed(S), _packed(B)
    config, options = blocks("up_backward", dY, R)
    num_parts = triton.cdiv(M, config["BLOCK_M"])
    num_r_blocks = triton.cdiv(R, config["BLOCK_R"])
    o_per_split = _split(O, config["BLOCK_O"], num_parts * num_r_blocks * K, dY)
    num_splits = triton.cdiv(O, o_per_split)
    # with one part, or one split, there are no partial sums: the kernel writes the result itself
    sums_dS, sums_dB = num_splits > 1 or not _is_packed(dS), add or num_parts > 1 or not dB.is_contiguous()
    dS_parts = dS.new_empty((num_splits, K, M, R), dtype=torch.float32) if sums_dS else dS[None]
    dB_parts = dB.new_empty((num_parts, K, O, R), dtype=torch.float32) if sums_dB else dB[None]
    far = _far(config["BLOCK_M"] * max(dY.stride(1), S.stride(1), dS_parts.stride(2)), O * max(B.stride(1), R))
    strides = (*dY.stride()[:2], *S.stride()[:2], *B.stride()[:2], *dS_parts.stride()[:3], *dB_parts.stride()[:2])
    sizes = (M, R, O, o_per_split, num_r_blocks)
    grouped_lora_up_backward_kernel[(num_parts, num_splits * num_r_blocks, K)](
        dY, S, B, dS_parts, dB_parts, scaling, *sizes, *strides, FAR=far, **config, **options
    )
    if sums_dS:
        _add_up(dS_parts, dS, False)
    if sums_dB:
        _add_up(dB_parts, dB, add)


@on_its_device
def down_backward(x: Tensor, dS: Tensor, dA: Tensor, add: bool) -> None:
    """dA [K, R, I] = dS^T x_k, of x [K, M, I] and dS [K, M, R]. `add`: to what dA holds."""
    (K, M, I), R = x.shape, dS.shape[2]
    if x.numel() == 0:
        if not add:
            dA.zero_()
        return
    x, dS = _packed(x), _packed(dS)
    config, options = blocks("down_backward", x, R)
    num_i_blocks, num_r_blocks = triton.cdiv(I, config["BLOCK_I"]), triton.cdiv(R, config["BLOCK_R"])
    m_per_split = _split(M, config["BLOCK_M"], num_i_blocks * num_r_blocks * K, x)
    num_splits = triton.cdiv(M, m_per_split)
    sums = add or num_splits > 1 or not dA.is_contiguous()
    dA_parts = dA.new_empty((num_splits, K, R, I), dtype=torch.float32) if sums else dA[None]
    far = _far(config["BLOCK_M"] * max(x.stride(1), dS.stride(1)))
    strides = (*x.stride()[:2], *dS.stride()[:2], *dA_parts.stride()[:2])
    grouped_lora_down_backward_kernel[(num_i_blocks, num_splits * num_r_blocks, K)](
        x, dS, dA_parts, M, R, I, m_per_split, num_r_blocks, *strides, FAR=far, **config, **options
    )
    if sums:
        _add_up(dA_parts, dA, add)


def _is_packed(tensor: Tensor) -> bool:
    """Whether the entries of its last dimension lie side by side."""
    return tensor.stride(-1) == 1 or tensor.shape[-1] == 1


def _packed(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it that is packed."""
    return tensor if _is_packed(tensor) else tensor.contiguous()


def _far(*reaches: int) -> bool:
    """Whether an offset within a tile could pass 2^31 elements. It is a sum of two, each at most one of these."""
    return max(reaches) >= 2**30


def _add_up(parts: Tensor, out: Tensor, add: bool) -> None:
    """Add up partial sums, in fp32 whatever the dtype of `out` is."""
    if add:
        out.add_(parts.sum(dim=0))
    elif out.dtype == parts.dtype:
        torch.sum(parts, dim=0, out=out)  # one launch instead of two
    else:
        out.copy_(parts.sum(dim=0))


def _split(size: int, block: int, num_programs: int, like: Tensor) -> int:
    """How many terms of a sum one program takes: a multiple of `block`, and few enough to fill the device."""
    num_blocks = triton.cdiv(size, block)
    num_splits = min(num_blocks, max(1, programs_wanted(like.device) // num_programs))
    return triton.cdiv(num_blocks, num_splits) * block
