"""The low-rank products over particles in plain PyTorch, on any device. The passes are those of
`triton_ops/grouped_lora.py`.

Layout: K particles, M rows, I/O in/out features, R rank. An input that all particles share is [1, M, I].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def grouped_lora(x: Tensor, A: Tensor, B: Tensor, scaling: float, base_out: Tensor | None) -> Tensor:
    """One batched product down and one up; the second also scales and adds. It has derivatives of any order."""
    K, R, _ = A.shape
    if x.dim() == 2:
        # a shared input is read once for all particles: [M, I] x [I, K R]
        down = (x @ A.reshape(K * R, -1).mT).view(-1, K, R).transpose(0, 1)
    else:
        down = torch.bmm(x, A.mT)
    if base_out is None:
        return scaling * torch.bmm(down, B.mT)
    base = base_out.expand(K, -1, -1)
    return torch.baddbmm(base, down, B.mT, alpha=scaling)


def new_counters(x: Tensor, ranks: Sequence[int], K: int) -> Tensor:
    """The kernels count; nothing here does."""
    return x.new_empty(0, dtype=torch.int32)


def shrink(x: Tensor, A: Tensor, S: Tensor, counters: Tensor) -> None:
    """S [K, M, R] = x A_k^T for x [K, M, I]."""
    torch.bmm(x, A.mT, out=S)


def expand(
    S: Sequence[Tensor], B: Sequence[Tensor], scaling: float, base: Sequence[Tensor], out: Sequence[Tensor]
) -> None:
    """Of every map: out [K, M, O] = base + scaling * S B_k^T; `base` [K or 1, M, O] may be `out`."""
    for s, b, of_base, y in zip(S, B, base, out, strict=True):
        if of_base is y:
            y.baddbmm_(s, b.mT, alpha=scaling)
        else:
            torch.baddbmm(of_base.expand_as(y), s, b.mT, alpha=scaling, out=y)


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
    for dy, s, b, ds, db in zip(dY, S, B, dS, dB, strict=True):
        # zeroed first: for beta = alpha = 0 the product in low precision would leave what stands there
        ds.zero_().baddbmm_(dy, b, alpha=scaling)
        product = torch.bmm(dy.mT, s)
        if add:
            db.add_(product, alpha=scaling)
        else:
            db.copy_(product).mul_(scaling)


def down_backward(x: Tensor, dS: Tensor, dA: Tensor, add: bool, counters: Tensor) -> None:
    """dA [K, R, I] = dS^T x_k, of x [K, M, I] and dS [K, M, R]. `add`: to what dA holds."""
    product = torch.bmm(dS.mT, x)
    if add:
        dA.add_(product)
    else:
        dA.copy_(product)
