"""Triton kernels of the low-rank products over particles. `grouped_lora.py` beside this file launches them.

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

import triton
import triton.language as tl


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
    i = tl.arange(0, BLOCK_I)
    program = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    num_programs = tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2)
    for start in range(program * BLOCK_I, num_counters, num_programs * BLOCK_I):
        tl.store(counters_ptr + start + i, tl.zeros((BLOCK_I,), tl.int32), mask=i < num_counters - start)
    k = tl.program_id(2).to(tl.int64)
    first_m = tl.program_id(0).to(tl.int64) * BLOCK_M
    m = _wide(tl.arange(0, BLOCK_M), FAR)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
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
