"""The low-rank products over particles in plain PyTorch, on any device. The passes are those of
`triton_ops/grouped_lora.py`.

Layout: K particles, M rows, I/O in/out features, R rank. An input that all particles share is [1, M, I].
"""

from __future__ import annotations

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


def shrink(x: Tensor, A: Tensor, S: Tensor) -> None:
    """S [K, M, R] = x A_k^T for x [K, M, I]."""
    torch.bmm(x, A.mT, out=S)


def expand(S: Tensor, B: Tensor, scaling: float, base: Tensor, out: Tensor) -> None:
    """out [K, M, O] = base + scaling * S B_k^T; `base` [K or 1, M, O] may be `out`."""
    if base is out:
        out.baddbmm_(S, B.mT, alpha=scaling)
    else:
        torch.baddbmm(base.expand_as(out), S, B.mT, alpha=scaling, out=out)


def up_backward(dY: Tensor, S: Tensor, B: Tensor, scaling: float, dS: Tensor, dB: Tensor, add: bool) -> None:
    """dS [K, M, R] = scaling * dY B_k and dB [K, O, R] = scaling * dY^T S, of dY [K, M, O]. `add`: to what dB holds."""
    # zeroed first: for beta = alpha = 0 the product in low precision would leave what stands there
    dS.zero_().baddbmm_(dY, B, alpha=scaling)
    product = torch.bmm(dY.mT, S)
    if add:
        dB.add_(product, alpha=scaling)
    else:
        dB.copy_(product).mul_(scaling)


def down_backward(x: Tensor, dS: Tensor, dA: Tensor, add: bool) -> None:
    """dA [K, R, I] = dS^T x_k, of x [K, M, I] and dS [K, M, R]. `add`: to what dA holds."""
    product = torch.bmm(dS.mT, x)
    if add:
        dA.add_(product)
    else:
        dA.copy_(product)
