"""grouped_lora: the low-rank update of every particle in one op.

Layout: K particles, M rows, I/O in/out features, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from renyi_kernels import lora_products, reference
from renyi_kernels.backend import refuse_tangents, resolve
from renyi_kernels.torch_ops import grouped_lora as torch_passes


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
        x: ``[K, M, I]``, one input per particle, or ``[M, I]``, one input that all particles share.
        A: ``[K, R, I]``; B: ``[K, O, R]``, in the dtype of x.
        scaling: the LoRA scaling, usually ``lora_alpha / R``.
        base_out: ``[K, M, O]``, or ``[M, O]`` (the base output of a shared input), or None for zero.
        backend: "auto", "triton", "torch" or "reference"; None takes that of `use_backend`.

    Returns:
        ``[K, M, O]``, differentiable in x, A, B and base_out. Second derivatives and forward mode work too, except on
        the "triton" path, where they raise a RuntimeError.

    Raises:
        ValueError: a shape does not fit. TypeError: the dtypes differ, or are not floating point.
    """
    _check(x, A, B, base_out)
    path = resolve("grouped_lora", x, backend)
    if path == "reference":
        return reference.grouped_lora(x, A, B, float(scaling), base_out)
    if path == "torch":
        return torch_passes.grouped_lora(x, A, B, float(scaling), base_out)
    refuse_tangents("grouped_lora", x, A, B, base_out)
    out: Tensor = _forward(x.contiguous(), A.contiguous(), B.contiguous(), float(scaling), base_out)[0]
    return out


def _check(x: Tensor, A: Tensor, B: Tensor, base_out: Tensor | None) -> None:
    if not x.is_floating_point():
        raise TypeError(f"x: expected a floating dtype; got {x.dtype}")
    if A.dim() != 3 or 0 in A.shape:
        raise ValueError(f"A: expected [K, R, I], each at least 1; got {list(A.shape)}")
    K, R, I = A.shape
    if x.dim() not in (2, 3) or x.shape[-1] != I or (x.dim() == 3 and x.shape[0] != K):
        raise ValueError(f"x: expected [K, M, I] or [M, I] with K={K}, I={I} (from A); got {list(x.shape)}")
    if B.dim() != 3 or B.shape[0] != K or B.shape[2] != R or B.shape[1] == 0:
        raise ValueError(f"B: expected [K, O, R] with K={K}, R={R} (from A) and O at least 1; got {list(B.shape)}")
    tensors = {"A": A, "B": B}
    if base_out is not None:
        tensors["base_out"] = base_out
        M, O = x.shape[-2], B.shape[1]
        if tuple(base_out.shape) not in ((K, M, O), (M, O)):
            raise ValueError(
                f"base_out: expected [K, M, O] or [M, O] with K={K}, M={M}, O={O}; got {list(base_out.shape)}"
            )
    for name, tensor in tensors.items():
        if tensor.dtype != x.dtype:
            raise TypeError(f"{name}: expected the dtype of x, {x.dtype}; got {tensor.dtype}; cast it first")


# the kernels as one operator, for autograd and torch.compile; x, A and B are contiguous


@torch.library.custom_op("renyi_kernels::grouped_lora", mutates_args=())
def _forward(x: Tensor, A: Tensor, B: Tensor, scaling: float, base_out: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    passes = lora_products.passes_of("triton")
    counters = lora_products.new_counters(passes, x, [B])
    S = lora_products.shrink(passes, x, A, counters)
    out = x.new_empty((A.shape[0], x.shape[-2], B.shape[1]))
    base = base_out.contiguous() if base_out is not None else None
    if base is not None and base.dim() == 2:
        base = base[None]
    passes.expand([lora_products.particle_major(S, x)], [B], scaling, None if base is None else [base], [out])
    return out, S, counters


@_forward.register_fake
def _(x: Tensor, A: Tensor, B: Tensor, scaling: float, base_out: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    (K, R, _), M = A.shape, x.shape[-2]
    counters = lora_products.new_counters(lora_products.passes_of("triton"), x, [B])
    return x.new_empty((K, M, B.shape[1])), x.new_empty((K, M, R) if x.dim() == 3 else (M, K, R)), counters


@torch.library.custom_op("renyi_kernels::grouped_lora_backward", mutates_args=())
def _backward(
    dY: Tensor, x: Tensor, A: Tensor, B: Tensor, S: Tensor, counters: Tensor, scaling: float, need_dx: bool
) -> tuple[Tensor, Tensor, Tensor]:
    passes = lora_products.passes_of("triton")
    dS, dA, dB = torch.empty_like(S), torch.empty_like(A), torch.empty_like(B)
    of_S, of_dS = (lora_products.particle_major(s, x) for s in (S, dS))
    passes.up_backward([dY.contiguous()], [of_S], [B], scaling, [of_dS], [dB], False, counters)
    dx = x.new_zeros(x.shape if need_dx else 0)
    if need_dx:
        lora_products.add_input_gradient(passes, dx, dS, A)
    lora_products.gradient_of_A(passes, x, dS, dA, False, counters)
    return dx, dA, dB


@_backward.register_fake
def _(
    dY: Tensor, x: Tensor, A: Tensor, B: Tensor, S: Tensor, counters: Tensor, scaling: float, need_dx: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape if need_dx else 0), torch.empty_like(A), torch.empty_like(B)


def _keep(ctx, inputs, output):
    x, A, B, ctx.scaling, base_out = inputs
    ctx.shared_base = base_out is not None and base_out.dim() == 2
    ctx.save_for_backward(x, A, B, *output[1:])


def _differentiate(ctx, dY, *_):
    x, A, B, S, counters = ctx.saved_tensors
    refuse_tangents("grouped_lora", dY)
    need_dx, *_, need_base = ctx.needs_input_grad
    dx, dA, dB = _backward(dY, x, A, B, S, counters, ctx.scaling, need_dx)
    dbase = (dY.sum(dim=0) if ctx.shared_base else dY) if need_base else None
    return dx if need_dx else None, dA, dB, None, dbase


def _refuse_second_derivative(ctx, *_):
    raise RuntimeError("grouped_lora: the kernels have no second derivative; use backend='reference' or 'torch'")


_forward.register_autograd(_differentiate, setup_context=_keep)
_backward.register_autograd(_refuse_second_derivative)
