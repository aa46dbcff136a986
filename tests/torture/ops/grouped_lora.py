"""Calls of grouped_lora, and the check of ops that are sums of products."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from renyi_kernels import grouped_lora, reference
from renyi_kernels.reference import at_least_fp32

from .comparing import eps, exact, require_close, value_and_gradients
from .drawing import Call, Draw, Tensors, look


def check_sums_of_products(
    formula: Callable[[Tensors, bool, float], Sequence[Tensor]],
    leaves: Tensors,
    dtype: torch.dtype,
    terms: int,
    scaling: float,
) -> Callable[[Sequence[Tensor], Tensors, Sequence[Tensor | None]], None]:
    """The check of an op that is linear in each input: on absolute values (True) it bounds its own rounding errors.

    `formula` takes leaves in fp64, whether it is on absolute values, and a scaling. `dtype` is what the op computes in,
    `terms` as many as are added up for one number, or more.
    """

    def check(outputs: Sequence[Tensor], upstream: Tensors, grads: Sequence[Tensor | None]) -> None:
        gold, up = [exact(x.to(dtype)) for x in leaves], [exact(u) for u in upstream]
        floor = torch.finfo(dtype).smallest_normal
        truth = value_and_gradients(lambda x: formula(x, False, scaling), gold, up)
        absolute = [x.abs().clamp(min=floor) for x in gold], [u.abs().clamp(min=floor) for u in up]
        sizes = value_and_gradients(lambda x: formula(x, True, abs(scaling)), *absolute)
        # what is multiplied by a small scaling at the end must not overflow before
        unscaled = value_and_gradients(lambda x: formula(x, True, max(1.0, abs(scaling))), *absolute)
        dtypes = [dtype] * len(outputs) + [x.dtype for x in leaves]
        underflow = terms * floor * max([1.0, *(x.abs().max().item() for x in (*gold, *up) if x.numel())]) ** 2
        for number, (ours, right, size, largest, kind) in enumerate(
            zip([*outputs, *grads], truth, sizes, unscaled, dtypes, strict=True), start=-len(outputs)
        ):
            if ours is None:
                continue
            name = f"gradient {number}" if number >= 0 else f"output {number + len(outputs)}"
            relative = 8 * eps(dtype, kind) + terms * eps(at_least_fp32(dtype))
            # the scaling may come after the rounding to a narrow type
            rounding = max(1.0, abs(scaling)) * torch.finfo(kind).smallest_normal * eps(kind)
            require_close(name, ours, right, relative * size + underflow + rounding, kind, largest, dtype)

    return check


def low_rank_sizes(draw: Draw) -> tuple[int, int, int, bool, float]:
    """K, M, I, whether all share x, scaling"""
    most = 150 if draw.chance(0.02) else 33
    scaling = draw.one_of(0.0, 1.0, 2.0, 1.75, -0.5, 1e-3, 16)
    return draw.size(4), draw.count(most), draw.size(most), draw.chance(0.4), scaling


def draw_grouped_lora(draw: Draw) -> Call:
    K, M, I, shared_x, scaling = low_rank_sizes(draw)
    O, R, dtype, of_A = draw.size(33), draw.size(17), draw.dtype(), None
    if empty := draw.chance(0.03):
        I, O, R = draw.one_of((0, O, R), (I, 0, R), (I, O, 0))
    elif draw.chance(0.03):
        of_A = draw.one_of(torch.float32, torch.float16, torch.int64)
    x = draw.normal(*(() if shared_x else (K,)), M, I, dtype=dtype, size=draw.one_of(1.0, 1.0, 1e-3, 30.0))
    A, B = draw.normal(K, R, I, dtype=of_A or dtype), draw.normal(K, O, R, dtype=dtype)
    base = draw.one_of(None, (K, M, O), (M, O))
    leaves = [x, A, B] if base is None else [x, A, B, draw.normal(*base, dtype=dtype)]

    def formula(leaves: Tensors, absolute: bool, scaling: float) -> Sequence[Tensor]:
        x, A, B, *base = leaves
        return [reference.grouped_lora(x, A, B, scaling, base[0] if base else None)]

    return Call(
        text=look(x=x, A=A, B=B, scaling=scaling, base_out=leaves[3] if base else None),
        leaves=leaves,
        constants=[],
        run=lambda leaves: [grouped_lora(*leaves[:3], scaling, *leaves[3:], backend=draw.backend)],
        check=check_sums_of_products(formula, leaves, dtype, K * (R + M) + I + O + 8, scaling),
        plain=lambda leaves: formula(leaves, False, scaling),
        must_refuse=of_A is not None and of_A != dtype,
        may_refuse=empty,
    )
