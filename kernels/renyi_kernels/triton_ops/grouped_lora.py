"""Triton kernels of the low-rank products over particles, and their launchers.

Four passes make every forward and backward (each kernel states its equation); `lora_products.py` puts them together.
`expand` and `up_backward` work on several maps in one launch: their programs are those of the first map, then those of
the second, and so on.

All of them sum in fp32 and in a fixed order, so two runs are bitwise equal. Where several programs add to one result,
each writes a partial sum of its own, and counts that it did. The last one adds up the partial sums, from the first to
the last, whichever program that is.

Offsets to the start of a tile have 64 bits. Offsets within a tile have 32, which takes fewer registers. If these could
pass 2^31 elements, the launcher sets FAR, and they have 64 bits too.

Layout: K particles, M rows, I/O in/out features, R rank, j a map. An input that all particles share is [1, M, I].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from renyi_kernels.torch_ops import grouped_lora as torch_passes
from renyi_kernels.triton_ops.device import on_its_device, programs_wanted
from renyi_kernels.triton_ops.launches import Launch, remembered
from renyi_kernels.triton_ops.tuning import SMALLEST_BLOCK_R, blocks, is_amd, vendor_is_faster


@triton.jit
def _wide(index, FAR: tl.constexpr):
    """The index, in 64 bits if FAR. Then every offset that is computed from it has 64 bits too."""
    return tl.cast(index, tl.int64) if FAR else index


@triton.jit
def _of_map(values, j):
    """values[j], of a tuple."""
    chosen = values[0]
    for number in tl.static_range(1, len(values)):
        chosen = tl.where(j == number, values[number], chosen)
    return chosen


@triton.jit
def _map_and_place(program, O, O_EACH, R, R_EACH: tl.constexpr):
    """The map that a program works on, and the program's number among those of this map. Each has so many outputs, and
    so many ranks, or all if R_EACH is None."""
    j = 0
    first = 0
    end = 0
    for number in tl.static_range(len(O) - 1):
        end += tl.cdiv(O[number], O_EACH) * (1 if R_EACH is None else tl.cdiv(R[number], R_EACH))
        later = program >= end
        j = tl.where(later, number + 1, j)
        first = tl.where(later, end, first)
    return j, program - first


@triton.jit
def _write(ptrs, value, mask, ADD: tl.constexpr):
    """Store the value, or add it to what stands there."""
    if ADD:
        value += tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    tl.store(ptrs, value.to(ptrs.dtype.element_ty), mask=mask)


@triton.jit
def _wait_for_stores(AMD: tl.constexpr, THREADS: tl.constexpr):
    """Wait until every thread of the program has stored what it stores. A barrier alone does not wait for stores to
    memory on an AMD GPU; elsewhere the release of the program's first thread, which follows, does."""
    if AMD:
        tl.inline_asm_elementwise(
            "s_waitcnt vmcnt(0)\nv_mov_b32 $0, $1",
            "=v,v,~{memory}",
            [tl.arange(0, THREADS)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    tl.debug_barrier()


@triton.jit
def _is_last(counter_ptr, num_programs):
    """Count this program. Whether it is the last one: then it may read what the others stored before they counted. The
    counter is 0 again for the next launch."""
    is_last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == num_programs - 1
    if is_last:
        tl.store(counter_ptr, 0)
    return is_last


@triton.jit
def grouped_lora_shrink_kernel(
    x_ptr,
    A_ptr,
    S_ptr,
    counters_ptr,
    num_counters,
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
    """S[k, m, r] = sum_i x[k, m, i] A[k, r, i], and the counters of the backward are set to 0"""
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
    program = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    num_programs = tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2)
    for start in range(program * BLOCK_I, num_counters, num_programs * BLOCK_I):
        tl.store(counters_ptr + start + i, tl.zeros((BLOCK_I,), tl.int32), mask=i < num_counters - start)


@triton.jit
def grouped_lora_expand_kernel(
    S_ptrs,
    B_ptrs,
    base_ptrs,
    out_ptrs,
    scaling,
    M,
    R,
    O,
    S_stride_k,
    S_stride_m,
    B_strides_k,
    B_strides_o,
    B_strides_r,
    base_strides_k,
    base_strides_m,
    out_strides_k,
    out_strides_m,
    HAS_BASE: tl.constexpr,
    FAR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out_j[k, m, o] = base_j[k, m, o] + scaling * sum_r S_j[k, m, r] B_j[k, o, r]; `base` may be `out` itself"""
    k = tl.program_id(2).to(tl.int64)
    first_m = tl.program_id(0).to(tl.int64) * BLOCK_M
    j, o_block = _map_and_place(tl.program_id(1), O, BLOCK_O, R, None)
    O_j = _of_map(O, j)
    R_j = _of_map(R, j)
    B_stride_o = _of_map(B_strides_o, j)
    B_stride_r = _of_map(B_strides_r, j)
    o = _wide(o_block * BLOCK_O + tl.arange(0, BLOCK_O), FAR)
    m = _wide(tl.arange(0, BLOCK_M), FAR)
    r = _wide(tl.arange(0, BLOCK_R), FAR)
    in_m = m < M - first_m
    in_o = o < O_j
    S_ptr = _of_map(S_ptrs, j) + k * S_stride_k + first_m * S_stride_m
    S_ptr += m[:, None] * S_stride_m + r[None, :]
    B_ptr = _of_map(B_ptrs, j) + k * _of_map(B_strides_k, j)
    B_ptr += o[None, :] * B_stride_o + r[:, None] * B_stride_r
    update = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
    for start in range(0, R_j, BLOCK_R):
        in_r = r < R_j - start
        S = tl.load(S_ptr + start, mask=in_m[:, None] & in_r[None, :], other=0.0)
        B = tl.load(B_ptr + _wide(start, FAR) * B_stride_r, mask=in_r[:, None] & in_o[None, :], other=0.0)
        update = tl.dot(S, B, update, input_precision="ieee")
    update *= scaling
    inside = in_m[:, None] & in_o[None, :]
    if HAS_BASE:
        base_stride_m = _of_map(base_strides_m, j)
        base_ptr = _of_map(base_ptrs, j) + k * _of_map(base_strides_k, j) + first_m * base_stride_m
        base_ptr += m[:, None] * base_stride_m + o[None, :]
        update += tl.load(base_ptr, mask=inside, other=0.0).to(tl.float32)
    out_stride_m = _of_map(out_strides_m, j)
    out_ptr = _of_map(out_ptrs, j) + k * _of_map(out_strides_k, j) + first_m * out_stride_m
    out_ptr += m[:, None] * out_stride_m + o[None, :]
    tl.store(out_ptr, update.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def grouped_lora_up_backward_kernel(
    dY_ptrs,
    S_ptrs,
    B_ptrs,
    dS_ptrs,
    dB_ptrs,
    parts_ptr,
    counters_ptr,
    scaling,
    M,
    R,
    O,
    O_PER_SPLIT,
    dY_strides_k,
    dY_strides_m,
    S_stride_k,
    S_stride_m,
    B_strides_k,
    B_strides_o,
    dS_stride_k,
    dS_stride_m,
    dB_strides_k,
    ADD: tl.constexpr,
    SPLITS_M: tl.constexpr,
    SPLITS_O: tl.constexpr,
    FAR: tl.constexpr,
    AMD: tl.constexpr,
    THREADS: tl.constexpr,
    WHOLE_R: tl.constexpr,
    PART_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Reads dY once and computes, for every map j, both

    dS[k, m, r] = scaling * sum_o dY[k, m, o] B[k, o, r]      (of a split of o; if SPLITS_O, these are added up)
    dB[k, o, r] = scaling * sum_m dY[k, m, o] S[k, m, r]      (of a block of m; if SPLITS_M, these are added up)

    A partial sum is a tile [BLOCK_M, PART_R] or [O_PER_SPLIT, PART_R] for each program. If ADD, dB is added to.
    """
    k = tl.program_id(2).to(tl.int64)
    part = tl.program_id(0).to(tl.int64)
    num_parts = tl.num_programs(0)
    tile = tl.program_id(1)
    num_tiles = tl.num_programs(1)
    j, place = _map_and_place(tile, O, O_PER_SPLIT, R, None if WHOLE_R else BLOCK_R)
    O_j = _of_map(O, j)
    R_j = _of_map(R, j)
    num_r_blocks = 1 if WHOLE_R else tl.cdiv(R_j, BLOCK_R)
    split = place // num_r_blocks
    first_m = part * BLOCK_M
    num_o = tl.minimum(O_PER_SPLIT, O_j - split * O_PER_SPLIT)
    first_o = split.to(tl.int64) * O_PER_SPLIT
    m = _wide(tl.arange(0, BLOCK_M), FAR)
    o = _wide(tl.arange(0, BLOCK_O), FAR)
    rank = tl.arange(0, BLOCK_R)
    r = (place % num_r_blocks) * BLOCK_R + rank
    in_m = m < M - first_m
    in_r = r < R_j
    in_part = rank < PART_R
    dY_stride_m = _of_map(dY_strides_m, j)
    dY_ptr = _of_map(dY_ptrs, j) + k * _of_map(dY_strides_k, j) + first_m * dY_stride_m + first_o
    dY_ptr += m[:, None] * dY_stride_m + o[None, :]
    B_stride_o = _of_map(B_strides_o, j)
    B_ptr = _of_map(B_ptrs, j) + k * _of_map(B_strides_k, j) + first_o * B_stride_o
    B_ptr += o[:, None] * B_stride_o + r[None, :]
    dB_ptr = _of_map(dB_ptrs, j) + k * _of_map(dB_strides_k, j) + first_o * R_j + (o[:, None] * R_j + r[None, :])
    # partial sums of dB lie behind those of dS
    num_tiles_dS = tl.num_programs(2).to(tl.int64) * num_parts * num_tiles
    dB_parts_ptr = parts_ptr + (num_tiles_dS * BLOCK_M * PART_R if SPLITS_O else 0)
    dB_parts_ptr += (k * num_tiles + tile) * num_parts * O_PER_SPLIT * PART_R + (o[:, None] * PART_R + rank[None, :])
    S_ptr = _of_map(S_ptrs, j) + k * S_stride_k + first_m * S_stride_m + (m[:, None] * S_stride_m + r[None, :])
    S = tl.load(S_ptr, mask=in_m[:, None] & in_r[None, :], other=0.0)
    dS = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(0, num_o, BLOCK_O):
        in_o = o < num_o - start
        dY = tl.load(dY_ptr + start, mask=in_m[:, None] & in_o[None, :], other=0.0)
        B = tl.load(B_ptr + _wide(start, FAR) * B_stride_o, mask=in_o[:, None] & in_r[None, :], other=0.0)
        dS = tl.dot(dY, B, dS, input_precision="ieee")
        dB = tl.dot(tl.trans(dY), S, input_precision="ieee") * scaling
        if SPLITS_M:
            tl.store(dB_parts_ptr + (part * O_PER_SPLIT + start) * PART_R, dB, mask=in_part[None, :])
        else:
            _write(dB_ptr + _wide(start, FAR) * R_j, dB, in_o[:, None] & in_r[None, :], ADD)
    dS *= scaling
    dS_ptr = _of_map(dS_ptrs, j) + k * dS_stride_k + first_m * dS_stride_m + (m[:, None] * dS_stride_m + r[None, :])
    in_dS = in_m[:, None] & in_r[None, :]
    # of the first split of these rows and ranks: its tile, and the counter of all splits
    of_rows = (k * num_parts + part) * num_tiles + tile - split * num_r_blocks
    dS_parts_ptr = parts_ptr + of_rows * BLOCK_M * PART_R + (tl.arange(0, BLOCK_M)[:, None] * PART_R + rank[None, :])
    if SPLITS_O:
        tl.store(dS_parts_ptr + split * num_r_blocks * BLOCK_M * PART_R, dS, mask=in_part[None, :])
    else:
        _write(dS_ptr, dS, in_dS, False)
    if SPLITS_O or SPLITS_M:
        _wait_for_stores(AMD, THREADS)
    if SPLITS_O:
        num_splits = tl.cdiv(O_j, O_PER_SPLIT)
        if _is_last(counters_ptr + of_rows, num_splits):
            dS = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
            for _ in range(num_splits):
                dS += tl.load(dS_parts_ptr, mask=in_part[None, :], other=0.0, cache_modifier=".cg")
                dS_parts_ptr += num_r_blocks * BLOCK_M * PART_R
            _write(dS_ptr, dS, in_dS, False)
    if SPLITS_M:  # noqa: SIM102 - what is known when the kernel is compiled, and what is not
        if _is_last(counters_ptr + (num_tiles_dS if SPLITS_O else 0) + k * num_tiles + tile, num_parts):
            for start in range(0, num_o, BLOCK_O):
                dB = tl.zeros((BLOCK_O, BLOCK_R), tl.float32)
                of_part = dB_parts_ptr + start * PART_R
                for _ in range(num_parts):
                    dB += tl.load(of_part, mask=in_part[None, :], other=0.0, cache_modifier=".cg")
                    of_part += O_PER_SPLIT * PART_R
                in_o = o < num_o - start
                _write(dB_ptr + _wide(start, FAR) * R_j, dB, in_o[:, None] & in_r[None, :], ADD)


@triton.jit
def grouped_lora_down_backward_kernel(
    x_ptr,
    dS_ptr,
    dA_ptr,
    parts_ptr,
    counters_ptr,
    M,
    R,
    I,
    M_PER_SPLIT,
    x_stride_k,
    x_stride_m,
    dS_stride_k,
    dS_stride_m,
    dA_stride_k,
    ADD: tl.constexpr,
    SPLITS: tl.constexpr,
    FAR: tl.constexpr,
    AMD: tl.constexpr,
    THREADS: tl.constexpr,
    WHOLE_R: tl.constexpr,
    PART_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """dA[k, r, i] = sum_m dS[k, m, r] x[k, m, i]      (of a split of m; if SPLITS, these are added up)

    A partial sum is a tile [BLOCK_I, PART_R] for each program. If ADD, dA is added to.
    """
    k = tl.program_id(2).to(tl.int64)
    num_r_blocks = 1 if WHOLE_R else tl.cdiv(R, BLOCK_R)
    split = tl.program_id(1) // num_r_blocks
    first_m = split.to(tl.int64) * M_PER_SPLIT
    m = _wide(tl.arange(0, BLOCK_M), FAR)
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    rank = tl.arange(0, BLOCK_R)
    r = (tl.program_id(1) % num_r_blocks) * BLOCK_R + rank
    in_i = i < I
    in_r = r < R
    in_part = rank < PART_R
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
    dA_ptrs = dA_ptr + k * dA_stride_k + (r[None, :].to(tl.int64) * I + i[:, None])
    in_dA = in_i[:, None] & in_r[None, :]
    if SPLITS:
        num_tiles = tl.num_programs(1)
        of_features = k * tl.num_programs(0) + tl.program_id(0)
        of_tile = of_features * num_tiles + tl.program_id(1) - split * num_r_blocks
        dA_parts_ptr = (
            parts_ptr + of_tile * BLOCK_I * PART_R + (tl.arange(0, BLOCK_I)[:, None] * PART_R + rank[None, :])
        )
        tl.store(dA_parts_ptr + split * num_r_blocks * BLOCK_I * PART_R, dA, mask=in_part[None, :])
        _wait_for_stores(AMD, THREADS)
        num_splits = num_tiles // num_r_blocks
        if _is_last(counters_ptr + of_tile, num_splits):
            dA = tl.zeros((BLOCK_I, BLOCK_R), tl.float32)
            for _ in range(num_splits):
                dA += tl.load(dA_parts_ptr, mask=in_part[None, :], other=0.0, cache_modifier=".cg")
                dA_parts_ptr += num_r_blocks * BLOCK_I * PART_R
            _write(dA_ptrs, dA, in_dA, ADD)
    else:
        _write(dA_ptrs, dA, in_dA, ADD)


# Launchers. Their inputs may have any strides. `S`, `dS` and `out` have to be packed. The maps of a launch have S and
# dS with the same strides. `counters` comes from `shrink`, and the launches of one backward share it one by one. Each
# launcher asks a function beside it for the launch. There is None if a tensor has to be copied first, if there is
# nothing to do, or if something else does it


@on_its_device
def shrink(x: Tensor, A: Tensor, S: Tensor, counters: Tensor) -> None:
    """S [K, M, R] = x A_k^T for x [K, M, I]. `counters` is set to 0."""
    launch = remembered(_launch_of_shrink, [x], [A], [S], [counters])
    if launch is not None:
        launch(x, A, S, counters)
    elif S.numel():
        shrink(_packed(x), _packed(A), S, counters)


def _launch_of_shrink(
    xs: Sequence[Tensor], As: Sequence[Tensor], Ss: Sequence[Tensor], all_counters: Sequence[Tensor]
) -> Launch | None:
    (x,), (A,), (S,), (counters,) = xs, As, Ss, all_counters
    assert _is_packed(S)
    if S.numel() == 0 or not (_is_packed(x) and _is_packed(A)):
        return None
    (K, M, I), R = x.shape, A.shape[1]
    config, options = blocks("shrink", x, R)
    grid = (triton.cdiv(M, config["BLOCK_M"]), triton.cdiv(R, config["BLOCK_R"]), K)
    far = _far(config["BLOCK_M"] * max(x.stride(1), S.stride(1)), R * A.stride(1))
    if far:
        options["num_warps"] = 8  # on an sm_80 the registers of 4 warps cannot hold offsets of 64 bits
    numbers = (counters.numel(), M, R, I, *x.stride()[:2], *A.stride()[:2], *S.stride()[:2])
    return Launch(grouped_lora_shrink_kernel, grid, numbers, {"FAR": far, **config, **options})


@on_its_device
def expand(
    S: Sequence[Tensor], B: Sequence[Tensor], scaling: float, base: Sequence[Tensor] | None, out: Sequence[Tensor]
) -> None:
    """Of every map: out [K, M, O] = base + scaling * S B_k^T; `base` [K or 1, M, O] may be `out`; B [K, O, R]."""
    launch = remembered(_launch_of_expand, S, B, base, out)
    if launch is not None:
        launch(tuple(S), tuple(B), tuple(out if base is None else base), tuple(out), scaling)
    elif base is not None and _by_vendor("expand", S, B, out):
        torch_passes.expand(S, B, scaling, base, out)
    elif base is not None and out[0].numel():
        expand(S, B, scaling, [*map(_packed, base)], out)


def _launch_of_expand(
    S: Sequence[Tensor], B: Sequence[Tensor], base: Sequence[Tensor] | None, out: Sequence[Tensor]
) -> Launch | None:
    assert all(map(_is_packed, (*S, *out)))
    K, M, _ = out[0].shape
    has_base = base is not None
    base = out if base is None else base
    if M == 0 or (has_base and _by_vendor("expand", S, B, out)) or not all(map(_is_packed, base)):
        return None
    O, R = tuple(b.shape[1] for b in B), tuple(b.shape[2] for b in B)
    config, options = blocks("expand", S[0], max(R))
    grid = (triton.cdiv(M, config["BLOCK_M"]), sum(triton.cdiv(o, config["BLOCK_O"]) for o in O), K)
    rows = max(t.stride(1) for t in (*S, *base, *out))
    reaches = [max(o * b.stride(1), r * b.stride(2)) for o, r, b in zip(O, R, B, strict=True)]
    far = _far(config["BLOCK_M"] * rows, *reaches)
    of_base = (tuple(b.stride(0) if b.shape[0] == K else 0 for b in base), tuple(b.stride(1) for b in base))
    numbers = (M, R, O, *_strides_of_all(S), *_strides(B, 3), *of_base, *_strides(out, 2))
    return Launch(grouped_lora_expand_kernel, grid, numbers, {"HAS_BASE": has_base, "FAR": far, **config, **options})


@on_its_device
def up_backward(
    dY: Sequence[Tensor],
    S: Sequence[Tensor],
    B: Sequence[Tensor],
    scaling: float,
    dS: Sequence[Tensor],
    dB: Sequence[Tensor],
    add: bool,
    counters: Tensor,
) -> None:
    """Of every map: dS [K, M, R] = scaling * dY B_k and dB [K, O, R] = scaling * dY^T S, of dY [K, M, O]. `add`: to
    what dB holds."""
    launch = remembered(_launch_of_up_backward, dY, S, B, dS, dB, [counters], add=add)
    if launch is not None:
        parts = _scratch(launch, counters)
        launch(tuple(dY), tuple(S), tuple(B), tuple(dS), tuple(dB), parts, counters, scaling)
    elif dY[0].shape[1] == 0:
        for db in () if add else dB:
            db.zero_()
    elif _by_vendor("up_backward", S, B, dY):
        torch_passes.up_backward(dY, S, B, scaling, dS, dB, add, counters)
    else:
        written = [_with_packed_rows(db, add) for db in dB]
        up_backward([*map(_packed, dY)], S, [*map(_packed, B)], scaling, dS, written, add, counters)
        _pass_on(written, dB, add)


def _launch_of_up_backward(
    dY: Sequence[Tensor],
    S: Sequence[Tensor],
    B: Sequence[Tensor],
    dS: Sequence[Tensor],
    dB: Sequence[Tensor],
    all_counters: Sequence[Tensor],
    add: bool,
) -> Launch | None:
    assert all(map(_is_packed, (*S, *dS)))
    K, M, _ = dY[0].shape
    if M == 0 or _by_vendor("up_backward", S, B, dY):
        return None
    if not all(map(_is_packed, (*dY, *B))) or not all(map(_has_packed_rows, dB)):
        return None
    O, R = tuple(b.shape[1] for b in B), tuple(b.shape[2] for b in B)
    plan = _plan_of_up_backward(dY[0], K, M, O, R)
    assert plan.num_counters <= all_counters[0].numel()
    rows = max(t.stride(1) for t in (*dY, *S, *dS))
    reaches = [o * max(b.stride(1), r) for o, r, b in zip(O, R, B, strict=True)]
    far = _far(plan.config["BLOCK_M"] * rows, *reaches)
    strides = (*_strides(dY, 2), *_strides_of_all(S), *_strides(B, 2), *_strides_of_all(dS), *_strides(dB, 1))
    constants = {"ADD": add, "FAR": far, **plan.flags, **plan.config, **plan.options}
    numbers = (M, R, O, plan.per_split, *strides)
    return Launch(grouped_lora_up_backward_kernel, plan.grid, numbers, constants, plan.num_parts)


@on_its_device
def down_backward(x: Tensor, dS: Tensor, dA: Tensor, add: bool, counters: Tensor) -> None:
    """dA [K, R, I] = dS^T x_k, of x [K, M, I] and dS [K, M, R]. `add`: to what dA holds."""
    launch = remembered(_launch_of_down_backward, [x], [dS], [dA], [counters], add=add)
    if launch is not None:
        launch(x, dS, dA, _scratch(launch, counters), counters)
    elif x.shape[1] == 0:
        if not add:
            dA.zero_()
    else:
        written = _with_packed_rows(dA, add)
        down_backward(_packed(x), _packed(dS), written, add, counters)
        _pass_on([written], [dA], add)


def _launch_of_down_backward(
    xs: Sequence[Tensor],
    all_dS: Sequence[Tensor],
    all_dA: Sequence[Tensor],
    all_counters: Sequence[Tensor],
    add: bool,
) -> Launch | None:
    (x,), (dS,), (dA,) = xs, all_dS, all_dA
    (_, M, I), R = x.shape, dS.shape[2]
    if M == 0 or not (_is_packed(x) and _is_packed(dS) and _has_packed_rows(dA)):
        return None
    plan = _plan_of_down_backward(x, R)
    assert plan.num_counters <= all_counters[0].numel()
    far = _far(plan.config["BLOCK_M"] * max(x.stride(1), dS.stride(1)))
    numbers = (M, R, I, plan.per_split, *x.stride()[:2], *dS.stride()[:2], dA.stride(0))
    constants = {"ADD": add, "FAR": far, **plan.flags, **plan.config, **plan.options}
    return Launch(grouped_lora_down_backward_kernel, plan.grid, numbers, constants, plan.num_parts)


def new_counters(x: Tensor, ranks: Sequence[int], K: int) -> Tensor:
    """As many counters as a backward of K particles can need, of maps of these ranks that read x. They are 0 after
    `shrink`, and after each launch.

    Partial sums of dS or dA are made only if all programs together are then no more than `programs_wanted`, but for one
    of each map that is not whole. Those of dB have one counter for all blocks of rows: as many in that case, and
    otherwise one for each particle, map and block of ranks.
    """
    n, wanted, r_blocks = len(ranks), programs_wanted(x.device), triton.cdiv(max(ranks), SMALLEST_BLOCK_R)
    return x.new_empty(wanted * (n + 2) + K * n * r_blocks, dtype=torch.int32)


class _Plan(NamedTuple):
    """How a sum is shared out: the grid, the terms of a split, how many numbers the partial sums have and how many
    counters they take, and what the kernel is compiled with."""

    grid: tuple[int, int, int]
    per_split: int
    num_parts: int
    num_counters: int
    flags: dict[str, int]
    config: dict[str, int]
    options: dict[str, int]


def _plan_of_up_backward(like: Tensor, K: int, M: int, O: tuple[int, ...], R: tuple[int, ...]) -> _Plan:
    config, options = blocks("up_backward", like, max(R))
    block_m, block_o, block_r = config["BLOCK_M"], config["BLOCK_O"], config["BLOCK_R"]
    parts = triton.cdiv(M, block_m)
    r_blocks = [triton.cdiv(r, block_r) for r in R]
    of_all = sum(triton.cdiv(o, block_o) for o in O) * block_o
    per_split = _split(of_all, block_o, parts * max(r_blocks) * K, like)
    splits = [triton.cdiv(o, per_split) for o in O]
    tiles = sum(s * r for s, r in zip(splits, r_blocks, strict=True))
    flags = {"SPLITS_M": parts > 1, "SPLITS_O": max(splits) > 1, **_flags(like, max(R), block_r, options)}
    rows = (parts * block_m if flags["SPLITS_O"] else 0) + (parts * per_split if flags["SPLITS_M"] else 0)
    counters = K * tiles * ((parts if flags["SPLITS_O"] else 0) + flags["SPLITS_M"])
    return _Plan((parts, tiles, K), per_split, K * tiles * rows * flags["PART_R"], counters, flags, config, options)


def _plan_of_down_backward(x: Tensor, R: int) -> _Plan:
    K, M, I = x.shape
    config, options = blocks("down_backward", x, R)
    i_blocks, r_blocks = triton.cdiv(I, config["BLOCK_I"]), triton.cdiv(R, config["BLOCK_R"])
    per_split = _split(M, config["BLOCK_M"], i_blocks * r_blocks * K, x)
    tiles = triton.cdiv(M, per_split) * r_blocks
    flags = {"SPLITS": per_split < M, **_flags(x, R, config["BLOCK_R"], options)}
    counters = K * i_blocks * tiles if flags["SPLITS"] else 0
    return _Plan(
        (i_blocks, tiles, K),
        per_split,
        counters * config["BLOCK_I"] * flags["PART_R"],
        counters,
        flags,
        config,
        options,
    )


def _flags(like: Tensor, rank: int, block_r: int, options: dict[str, int]) -> dict[str, int]:
    """What both kernels that add up are told. PART_R: of so many ranks a partial sum is stored."""
    amd = is_amd(like.device)
    part_r = min(block_r, 1 << (rank - 1).bit_length())
    return {
        "WHOLE_R": rank <= block_r,
        "PART_R": part_r,
        "AMD": amd,
        "THREADS": options["num_warps"] * (64 if amd else 32),
    }


def _scratch(launch: Launch, counters: Tensor) -> Tensor:
    """Memory for the partial sums. If there are none, any tensor will do."""
    return counters.new_empty(launch.scratch, dtype=torch.float32) if launch.scratch else counters


def _by_vendor(kernel: str, S: Sequence[Tensor], B: Sequence[Tensor], Y: Sequence[Tensor]) -> bool:
    """Whether the pass of `torch_ops` is faster, for all maps. It has no `expand` for several maps in one launch."""
    if kernel == "expand" and len(Y) > 1:
        return False
    return all(vendor_is_faster(kernel, S[0], b.shape[2], y.shape[1], b.shape[1]) for y, b in zip(Y, B, strict=True))


def _strides(tensors: Sequence[Tensor], count: int) -> list[tuple[int, ...]]:
    """The first strides of all tensors, dimension by dimension."""
    return [tuple(t.stride(d) for t in tensors) for d in range(count)]


def _strides_of_all(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """The first two strides, which all tensors have."""
    strides = tensors[0].stride()[:2]
    assert all(t.stride()[:2] == strides for t in tensors)
    return strides


def _is_packed(tensor: Tensor) -> bool:
    """Whether the entries of its last dimension lie side by side."""
    return tensor.stride(-1) == 1 or tensor.shape[-1] == 1


def _has_packed_rows(gradient: Tensor) -> bool:
    """Whether each of its matrices is one block of memory."""
    return gradient[0].is_contiguous()


def _with_packed_rows(gradient: Tensor, add: bool) -> Tensor:
    """The tensor if each of its matrices is one block of memory. Otherwise another one for the values that go to it."""
    if _has_packed_rows(gradient):
        return gradient
    new = gradient.new_zeros if add else gradient.new_empty
    return new(gradient.shape, dtype=torch.float32)


def _pass_on(written: Sequence[Tensor], gradients: Sequence[Tensor], add: bool) -> None:
    """Bring what was written elsewhere to the gradients."""
    for own, gradient in zip(written, gradients, strict=True):
        if own is not gradient:
            gradient.add_(own) if add else gradient.copy_(own)


def _packed(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it that is packed."""
    return tensor if _is_packed(tensor) else tensor.contiguous()


def _far(*reaches: int) -> bool:
    """Whether an offset within a tile could pass 2^31 elements. It is a sum of two, each at most one of these."""
    return max(reaches) >= 2**30


def _split(size: int, block: int, num_programs: int, like: Tensor) -> int:
    """How many terms of a sum one program takes: a multiple of `block`, and few enough to fill the device."""
    num_blocks = triton.cdiv(size, block)
    num_splits = min(num_blocks, max(1, programs_wanted(like.device) // num_programs))
    return triton.cdiv(num_blocks, num_splits) * block
