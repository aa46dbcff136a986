"""Calls of lora_linears."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from renyi_kernels import lora_linears, reference

from .comparing import exact
from .drawing import Call, Draw, Tensors, look
from .grouped_lora import check_sums_of_products, low_rank_sizes


def draw_lora_linears(draw: Draw) -> Call:
    K, M, I, shared_x, scaling = low_rank_sizes(draw)
    n, dtype = draw.size(3), draw.dtype()
    O, R = [draw.size(33) for _ in range(n)], [draw.size(9) for _ in range(n)]
    if empty := draw.chance(0.03):
        I, O[-1], R[-1] = draw.one_of((0, O[-1], R[-1]), (I, 0, R[-1]), (I, O[-1], 0))
    x = draw.normal(*(() if shared_x else (K,)), M, I, dtype=dtype, size=draw.one_of(1.0, 1.0, 1e-3, 30.0))
    of_weights = draw.floating() if draw.chance(0.02) else dtype
    weights = [draw.normal(o, I, dtype=of_weights) for o in O]
    biases = [draw.normal(o, dtype=dtype) if draw.chance(0.5) else None for o in O]
    mixed = draw.chance(0.4)
    of = lambda: draw.floating() if mixed else dtype
    A = [draw.normal(K, r, I, dtype=of()) for r in R]
    B = [draw.normal(K, o, r, dtype=of()) for o, r in zip(O, R, strict=True)]
    leaves = [x, *A, *B]

    def run(leaves: Tensors) -> Sequence[Tensor]:
        x, *adapters = leaves
        return lora_linears(x, weights, biases, adapters[:n], adapters[n:], scaling, backend=draw.backend)

    def formula(leaves: Tensors, absolute: bool, scaling: float) -> Sequence[Tensor]:
        x, *adapters = leaves
        fixed = [[None if t is None else exact(t) for t in tensors] for tensors in (weights, biases)]
        if absolute:
            fixed = [[None if t is None else t.abs() for t in tensors] for tensors in fixed]
        outs = reference.lora_linears(x, *fixed, adapters[:n], adapters[n:], scaling)
        return [out.expand(K, *out.shape[-2:]) for out in outs]

    return Call(
        text=look(x=x, weights=weights, biases=biases, A=A, B=B, scaling=scaling),
        leaves=leaves,
        constants=[t for t in (*weights, *biases) if t is not None],
        run=run,
        check=check_sums_of_products(formula, leaves, dtype, K * (sum(R) + M) + I + sum(O) + 8, scaling),
        plain=lambda leaves: formula(leaves, False, scaling),
        num_differentiable=n,
        must_refuse=of_weights != dtype,
        may_refuse=empty,
    )
