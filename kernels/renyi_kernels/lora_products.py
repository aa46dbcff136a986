"""What the two low-rank ops share: how their passes work over particles, over a shared input and over several maps.

Layout: K particles, M rows, I/O in/out features, R the ranks of all maps together.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from renyi_kernels.torch_ops import grouped_lora as torch_passes


def passes_of(path: str) -> ModuleType:
    """The module with the `shrink`, `expand`, `up_backward` and `down_backward` of a path."""
    if path == "torch":
        return torch_passes
    from renyi_kernels.triton_ops import grouped_lora as triton_passes  # needs triton

    return triton_passes


def stack(A: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The A [K, R_j, I] of several maps as one tensor [K, R, I] of that dtype."""
    K, _, I = A[0].shape
    stacked = A[0].new_empty((K, sum(a.shape[1] for a in A), I), dtype=dtype)
    for part, a in zip(stacked.split([a.shape[1] for a in A], dim=1), A, strict=True):
        part.copy_(a)
    return stacked


def split(S: Tensor, A: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The columns of S [K, M, R] that belong to each map."""
    return S.split([a.shape[1] for a in A], dim=2)


def particle_major(S: Tensor, x: Tensor) -> Tensor:
    """S as [K, M, R]. For a shared input x it lies in memory as [M, K, R], because one product made it for all."""
    return S if x.dim() == 3 else S.transpose(0, 1)


def shrink(passes: ModuleType, x: Tensor, A: Tensor, counters: Tensor) -> Tensor:
    """x A_k^T, for an input of each particle [K, M, I] or a shared one [M, I], which is read once. Then A has to be one
    matrix [K R, I], and is copied if it is not. The result lies in memory as `particle_major` says."""
    (K, R, I), M = A.shape, x.shape[-2]
    if x.dim() == 3:
        S = x.new_empty((K, M, R))
        passes.shrink(x, A, S, counters)
    else:
        S = x.new_empty((M, K, R))
        passes.shrink(x[None], A.reshape(1, K * R, I), S.view(1, M, K * R), counters)
    return S


def new_counters(passes: ModuleType, x: Tensor, B: Sequence[Tensor]) -> Tensor:
    """What `shrink` sets to 0 and the backward of these maps counts in."""
    counters: Tensor = passes.new_counters(x, [b.shape[2] for b in B], B[0].shape[0])
    return counters


def add_input_gradient(passes: ModuleType, dx: Tensor, dS: Tensor, A: Tensor) -> None:
    """dx += dS_k A_k, in place, for dx like x. If the particles share x, it is summed over them."""
    K, R, I = A.shape
    if dx.dim() == 3:
        passes.expand([dS], [A.mT], 1.0, [dx], [dx])
    else:
        dx = dx[None]
        passes.expand([dS.view(1, dx.shape[1], K * R)], [A.reshape(1, K * R, I).mT], 1.0, [dx], [dx])


def gradient_of_A(passes: ModuleType, x: Tensor, dS: Tensor, dA: Tensor, add: bool, counters: Tensor) -> None:
    """dA [K, R, I] = dS_k^T x_k, or += if `add`. x is read once for all maps."""
    if x.dim() == 3:
        passes.down_backward(x, dS, dA, add, counters)
    elif add or not dA.is_contiguous():
        own = torch.empty_like(dA, memory_format=torch.contiguous_format)
        gradient_of_A(passes, x, dS, own, False, counters)
        dA.add_(own) if add else dA.copy_(own)
    else:
        M, K, R = dS.shape
        passes.down_backward(x[None], dS.view(1, M, K * R), dA.view(1, K * R, -1), False, counters)
