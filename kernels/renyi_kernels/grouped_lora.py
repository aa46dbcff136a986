"""grouped_lora: the low-rank update of every particle in one op.

Layout: K particles, M rows, I/O in/out features, R rank.
"""

from __future__ import annotations

from torch import Tensor

from renyi_kernels import reference, torch_ops
from renyi_kernels.backend import resolve

PATHS = {"torch": torch_ops.grouped_lora, "reference": reference.grouped_lora}


def grouped_lora(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float,
    base_out: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Low-rank update of K particles: ``out_k = base_out_k + scaling * (x_k A_k^T) B_k^T``.

    Args:
        x: ``[K, M, I]``, one input per particle, or ``[M, I]``, one input shared by all.
        A: ``[K, R, I]``; B: ``[K, O, R]``, in the dtype of x.
        scaling: LoRA scaling, usually ``lora_alpha / R``.
        base_out: ``[K, M, O]``, or ``[M, O]`` (the base output of a shared input), or None for zero.
        backend: "auto", "triton", "torch" or "reference"; None takes the one of `use_backend`.

    Returns:
        ``[K, M, O]``. Differentiable, twice too, in x, A, B and base_out.

    Raises:
        ValueError: a shape does not fit. TypeError: the dtypes differ.
    """
    _check(x, A, B, base_out)
    path = resolve("grouped_lora", PATHS, x.device, backend)
    return PATHS[path](x, A, B, float(scaling), base_out)


def _check(x: Tensor, A: Tensor, B: Tensor, base_out: Tensor | None) -> None:
    if A.dim() != 3:
        raise ValueError(f"A: expected [K, R, I]; got {list(A.shape)}")
    K, R, I = A.shape  # noqa: E741
    if x.dim() not in (2, 3) or x.shape[-1] != I or (x.dim() == 3 and x.shape[0] != K):
        raise ValueError(f"x: expected [K, M, I] or [M, I] with K={K}, I={I} (from A); got {list(x.shape)}")
    if B.dim() != 3 or B.shape[0] != K or B.shape[2] != R:
        raise ValueError(f"B: expected [K, O, R] with K={K}, R={R} (from A); got {list(B.shape)}")
    tensors = {"A": A, "B": B}
    if base_out is not None:
        tensors["base_out"] = base_out
        M, O = x.shape[-2], B.shape[1]  # noqa: E741
        if tuple(base_out.shape) not in ((K, M, O), (M, O)):
            raise ValueError(
                f"base_out: expected [K, M, O] or [M, O] with K={K}, M={M}, O={O}; got {list(base_out.shape)}"
            )
    for name, tensor in tensors.items():
        if tensor.dtype != x.dtype:
            raise TypeError(f"{name}: expected the dtype of x, {x.dtype}; got {tensor.dtype}; cast it first")
