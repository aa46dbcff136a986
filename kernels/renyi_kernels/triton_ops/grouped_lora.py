"""The low-rank products over particles by Triton kernels. The passes are those of `torch_ops/grouped_lora.py`.

Four passes make every forward and backward (each kernel of `lora_kernels.py` states its equation); `lora_products.py`
puts them together. Their inputs may have any strides. `S`, `dS` and `out` have to be packed, and the maps of a launch
have S and dS with the same strides. `counters` comes from `shrink`, and the launches of one backward share it one by
one.

Each launcher asks a function beside it for the launch. It gets None if a tensor has to be copied first, if there is
nothing to do, or if something else does it.

Layout: K particles, M rows, I/O in/out features, R rank. An input that all particles share is [1, M, I].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from renyi_kernels.torch_ops import grouped_lora as torch_passes
from renyi_kernels.triton_ops.device import on_its_device, programs_wanted
from renyi_kernels.triton_ops.launches import Launch, remembered
from renyi_kernels.triton_ops.lora_kernels import (
    grouped_lora_down_backward_kernel,
    grouped_lora_expand_kernel,
    grouped_lora_shrink_kernel,
    grouped_lora_up_backward_kernel,
)
from renyi_kernels.triton_ops.tuning import SMALLEST_BLOCK_R, blocks, is_amd, vendor_is_faster


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
        written = _writable(dB, add)
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
    if not all(map(_is_packed, (*dY, *B))) or not _are_writable(dB):
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
        written = _writable([dA], add)
        down_backward(_packed(x), _packed(dS), written[0], add, counters)
        _pass_on(written, [dA], add)


def _launch_of_down_backward(
    xs: Sequence[Tensor],
    all_dS: Sequence[Tensor],
    all_dA: Sequence[Tensor],
    all_counters: Sequence[Tensor],
    add: bool,
) -> Launch | None:
    (x,), (dS,), (dA,) = xs, all_dS, all_dA
    (_, M, I), R = x.shape, dS.shape[2]
    if M == 0 or not (_is_packed(x) and _is_packed(dS) and _are_writable(all_dA)):
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


def _are_writable(gradients: Sequence[Tensor]) -> bool:
    """Whether a launch can write to these: each matrix of each is one block of memory, and they have one dtype."""
    return all(g[0].is_contiguous() and g.dtype == gradients[0].dtype for g in gradients)


def _writable(gradients: Sequence[Tensor], add: bool) -> Sequence[Tensor]:
    """The gradients if a launch can write to them. Otherwise others, for the values that go to them."""
    if _are_writable(gradients):
        return gradients
    return [(g.new_zeros if add else g.new_empty)(g.shape, dtype=torch.float32) for g in gradients]


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
