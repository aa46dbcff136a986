"""lora_linears: frozen linear maps that read one input, each with the low-rank update of every particle, in one op.

Layout: K particles, M rows, I/O in/out features, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from renyi_kernels import lora_products, reference
from renyi_kernels.backend import no_forward_mode, refuse_tangents, resolve


def lora_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    scaling: float,
    *,
    copies: tuple[Tensor, Sequence[Tensor]] | None = None,
    gradients: Callable[[], tuple[Tensor, Sequence[Tensor]] | None] | None = None,
    backend: str | None = None,
) -> list[Tensor]:
    """Adapted maps that read the same input, e.g. q, k, v: ``y_jk = x_k W_j^T + b_j + scaling * (x_k A_jk^T) B_jk^T``.

    `grouped_lora` works on one map, without its frozen weight. This op works on all maps, and saves more: it reads x
    once for the A of all maps, adds the updates into the base outputs in place, and sums the gradient of x in place.

    Args:
        x: ``[K, M, I]``, one input per particle, or ``[M, I]``, one input that all particles share. Then the frozen
            maps run once.
        weights: n frozen maps ``[O_j, I]``, in the dtype of x. biases: n times ``[O_j]`` or None, frozen.
        A: n times ``[K, R_j, I]``; B: n times ``[K, O_j, R_j]``, in any floating dtypes. The products are computed in
            the dtype of x, and each gradient has the dtype of its adapter.
        scaling: the LoRA scaling, usually ``lora_alpha / R``.
        copies: (A_block, [B_1, ..., B_n]), the values of A and B in the dtype of x, if the caller holds them: A_block
            ``[K, R_1 + ... + R_n, I]`` has the A of all maps, one below the other. Then the op makes no copies of its
            own (but one of A_block if the particles share x and A_block is not contiguous). The gradients go to A and
            B, and a change of A, B or the copies before the backward is an error there. All of them may be views of
            one matrix ``[K, P]``. The "reference" path takes A and B themselves.
        gradients: a function that the backward calls, if every A and B requires a gradient. It gives (dA_block,
            [dB_1, ..., dB_n]), of the shapes of `copies`, in any floating dtype and with any strides. Then the backward
            adds the gradients of A and B to these in place, and autograd gets none for them. If it gives None, autograd
            gets them as ever. It is not called by the "reference" path, under `torch.compile`, or in a backward with
            ``create_graph=True``. There autograd always gets them.
        backend: "auto", "triton", "torch" or "reference"; None takes that of `use_backend`.

    Returns:
        n times ``[K, M, O_j]``, differentiable once in x, A and B. A second derivative or forward mode raises a
        RuntimeError, except with ``backend="reference"``.

    Raises:
        ValueError: a shape does not fit. TypeError: a dtype does not.
        RuntimeError: in the backward, if a weight or a bias requires a gradient, or a saved tensor was changed.
    """
    weights, biases, A, B = list(weights), list(biases), list(A), list(B)
    _check(x, weights, biases, A, B)
    values = [] if copies is None else _check_copies(copies, x, A, B)
    path = resolve("lora_linears", x, backend)
    if path == "reference":
        return reference.lora_linears(x, weights, biases, A, B, float(scaling))
    # autograd sees the tensors in a list only if the list holds nothing else, so an empty tensor stands for no bias
    present = [weight.new_empty(0) if bias is None else bias for weight, bias in zip(weights, biases, strict=True)]
    x = x.contiguous()
    if torch.compiler.is_compiling() or x.is_meta or type(x) not in (Tensor, torch.nn.Parameter):
        refuse_tangents("lora_linears", x, *weights, *present, *A, *B, *values)
        return list(_forward(x, weights, present, A, B, values, float(scaling), path)[:-2])
    return list(_Eager.apply(float(scaling), path, len(A), gradients, x, *weights, *present, *A, *B, *values))


def _check(x: Tensor, weights: list[Tensor], biases: list[Tensor | None], A: list[Tensor], B: list[Tensor]) -> None:
    if not len(weights) == len(biases) == len(A) == len(B) >= 1:
        raise ValueError(
            "weights, biases, A, B: expected one of each for every map, and at least one map; "
            f"got {len(weights)}, {len(biases)}, {len(A)} and {len(B)}"
        )
    if not x.is_floating_point():
        raise TypeError(f"x: expected a floating dtype; got {x.dtype}")
    if x.dim() not in (2, 3) or x.shape[-1] == 0:
        raise ValueError(f"x: expected [K, M, I] or [M, I], I at least 1; got {list(x.shape)}")
    I = x.shape[-1]
    K = x.shape[0] if x.dim() == 3 else A[0].shape[0]
    for j, (weight, bias, a, b) in enumerate(zip(weights, biases, A, B, strict=True)):
        if weight.dim() != 2 or weight.shape[1] != I or weight.shape[0] == 0:
            expected = f"[O, I] with I={I} (from x) and O at least 1"
            raise ValueError(f"weights[{j}]: expected {expected}; got {list(weight.shape)}")
        O = weight.shape[0]
        if bias is not None and tuple(bias.shape) != (O,):
            raise ValueError(f"biases[{j}]: expected [O] = [{O}]; got {list(bias.shape)}")
        if a.dim() != 3 or a.shape[0] != K or a.shape[2] != I or 0 in a.shape:
            expected = f"[K, R, I] with K={K}, I={I}, each at least 1"
            raise ValueError(f"A[{j}]: expected {expected}; got {list(a.shape)}")
        if tuple(b.shape) != (K, O, a.shape[1]):
            raise ValueError(f"B[{j}]: expected [K, O, R] = [{K}, {O}, {a.shape[1]}]; got {list(b.shape)}")
        for name, tensor in (("weights", weight), ("biases", bias)):
            if tensor is not None and tensor.dtype != x.dtype:
                raise TypeError(f"{name}[{j}]: expected the dtype of x, {x.dtype}; got {tensor.dtype}; cast it once")
        for name, tensor in (("A", a), ("B", b)):
            if not tensor.is_floating_point():
                raise TypeError(f"{name}[{j}]: expected a floating dtype; got {tensor.dtype}")


def _check_copies(copies: tuple[Tensor, Sequence[Tensor]], x: Tensor, A: list[Tensor], B: list[Tensor]) -> list[Tensor]:
    """The copies one after the other: A_block, B_1, ..., B_n."""
    values = _check_parts("copies", copies, A, B)
    for name, tensor in values.items():
        if tensor.dtype != x.dtype:
            raise TypeError(f"{name}: expected the dtype of x, {x.dtype}; got {tensor.dtype}")
    return list(values.values())


def _check_parts(
    name: str, parts: tuple[Tensor, Sequence[Tensor]], A: Sequence[Tensor], B: Sequence[Tensor]
) -> dict[str, Tensor]:
    """A_block, B_1, ..., B_n of `copies` or `gradients`, by the names that a message calls them."""
    if len(parts) != 2 or len(parts[1]) != len(B):
        expected = f"(A_block, [B_1, ..., B_n]) with a B for each of the {len(B)} maps"
        raise ValueError(f"{name}: expected {expected}; got a sequence of another length")
    K, _, I = A[0].shape
    found = {f"{name}[0]": parts[0]} | {f"{name}[1][{j}]": b for j, b in enumerate(parts[1])}
    shapes = [(K, sum(a.shape[1] for a in A), I), *(b.shape for b in B)]
    for (part, tensor), shape in zip(found.items(), shapes, strict=True):
        if tensor.shape != shape:
            raise ValueError(f"{part}: expected {list(shape)}, as A and B have it; got {list(tensor.shape)}")
        if not tensor.is_floating_point():
            raise TypeError(f"{part}: expected a floating dtype; got {tensor.dtype}")
    return found


# the work. x is contiguous, and an empty tensor stands for no bias. `values` is A_block, B_1, ..., B_n in the dtype of
# x; if it is empty, they are made here. `_outputs` also returns what the backward needs: x A^T of all maps, and the
# counters of the kernels


def _outputs(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    values: Sequence[Tensor],
    scaling: float,
    path: str,
) -> list[Tensor]:
    passes = lora_products.passes_of(path)
    K, M, I = A[0].shape[0], *x.shape[-2:]
    with torch.autocast(x.device.type, enabled=False):
        counters = lora_products.new_counters(passes, x, B)
        S = lora_products.shrink(passes, x, values[0] if values else lora_products.stack(A, x.dtype), counters)
        outs, bases = [], []
        for weight, bias in zip(weights, biases, strict=True):
            # no view, because a model may change an output in place
            out = x.new_empty((K, M, weight.shape[0]))
            base = out if x.dim() == 3 else x.new_empty((1, M, weight.shape[0]))
            rows = base.view(-1, weight.shape[0])
            if bias.numel():
                torch.addmm(bias, x.view(-1, I), weight.mT, out=rows)
            else:
                torch.mm(x.view(-1, I), weight.mT, out=rows)
            outs.append(out)
            bases.append(base)
        by_map = lora_products.split(lora_products.particle_major(S, x), A)
        passes.expand(by_map, values[1:] or [b.to(x.dtype) for b in B], scaling, bases, outs)
    return [*outs, S, counters]


def _gradients(
    dY: Sequence[Tensor],
    x: Tensor,
    S: Tensor,
    counters: Tensor,
    weights: Sequence[Tensor],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    values: Sequence[Tensor],
    scaling: float,
    need_dx: bool,
    path: str,
) -> list[Tensor]:
    """The gradients of x (empty if it is not needed), of all A as one tensor [K, R, I], and of each B."""
    dA, dB = _unwritten_block(A, _common_dtype(A)), [b.new_empty(b.shape) for b in B]
    return [_differentiated(dY, x, S, counters, weights, A, B, values, scaling, need_dx, path, dA, dB, False), dA, *dB]


def _differentiated(
    dY: Sequence[Tensor],
    x: Tensor,
    S: Tensor,
    counters: Tensor,
    weights: Sequence[Tensor],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    values: Sequence[Tensor],
    scaling: float,
    need_dx: bool,
    path: str,
    dA: Tensor,
    dB: Sequence[Tensor],
    add: bool,
) -> Tensor:
    """The gradient of x (empty if it is not needed). Those of A and B are written to dA and dB, or added if `add`."""
    passes = lora_products.passes_of(path)
    dY = [dy.contiguous() for dy in dY]
    dS = torch.empty_like(S)
    dx = x.new_empty(x.shape if need_dx else 0)
    with torch.autocast(x.device.type, enabled=False):
        by_map = [lora_products.split(lora_products.particle_major(s, x), A) for s in (S, dS)]
        in_dtype = values[1:] or [b.to(x.dtype) for b in B]
        passes.up_backward(dY, by_map[0], in_dtype, scaling, by_map[1], dB, add, counters)
        if need_dx:
            rows = dx.view(-1, x.shape[-1])
            for j, (dy, weight) in enumerate(zip(dY, weights, strict=True)):
                dy = dy.flatten(0, 1) if x.dim() == 3 else dy.sum(dim=0)
                torch.addmm(rows, dy, weight, beta=float(j > 0), out=rows)
            A_block = values[0] if values else lora_products.stack(A, x.dtype)
            lora_products.add_input_gradient(passes, dx, dS, A_block)
        lora_products.gradient_of_A(passes, x, dS, dA, add, counters)
    return dx


def _unwritten_block(A: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """One tensor [K, R, I] for all A."""
    K, _, I = A[0].shape
    return A[0].new_empty((K, sum(a.shape[1] for a in A), I), dtype=dtype)


def _common_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors))


def _differentiate(ctx, run, dY, need_dx, need_weights, need_biases, gradients=None):
    """(the gradient of x or None, one for each A, one for each B). `run` is `_gradients` in the form for autograd.
    If there are `gradients`, those of A and B are added to them, and are None here."""
    for name, needed in (("weights", need_weights), ("biases", need_biases)):
        if any(needed):
            raise RuntimeError(
                f"lora_linears: the {name} are taken as frozen, but one of them requires a gradient; "
                "call requires_grad_(False) on it, or use backend='reference'"
            )
    x, S, counters, *maps = ctx.saved_tensors
    weights, A, B, values = _in_parts(maps, 3, len(dY))
    arguments = (dY, x, S, counters, weights, A, B, values, ctx.scaling, need_dx, ctx.path)
    if gradients is not None:
        held, *of_B = _check_parts("gradients", gradients, A, B).values()
        dx = _differentiated(*arguments, held, of_B, True)
        return dx if need_dx else None, [None] * len(A), [None] * len(B)
    dx, dA, *dB = run(*arguments)
    dA = [da.to(a.dtype) for da, a in zip(dA.split([a.shape[1] for a in A], dim=1), A, strict=True)]
    return dx if need_dx else None, dA, dB


def _refuse_second_derivative(ctx, *_):
    raise RuntimeError("lora_linears: this path has no second derivative; use backend='reference'")


def _refuse_forward_mode(ctx, *_):
    raise RuntimeError(no_forward_mode("lora_linears"))


def _in_parts(tensors: Sequence[Any], count: int, n: int) -> list[Sequence[Any]]:
    """The tensors cut into `count` parts, one of n for each map, and what is left: the values of A and B."""
    return [*(tensors[i * n : (i + 1) * n] for i in range(count)), tensors[count * n :]]


# what eager autograd sees: tensors, and no lists of them. An operator would go through its lists in Python twice for
# each call; a step has a hundred calls, and a GPU would wait for that


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scaling, path, num_maps, gradients, x, *maps):
        weights, biases, A, B, values = _in_parts(maps, 4, num_maps)
        *outs, S, counters = _outputs(x, weights, biases, A, B, values, scaling, path)
        ctx.scaling, ctx.path, ctx.gradients = scaling, path, gradients
        ctx.save_for_backward(x, S, counters, *weights, *A, *B, *values)
        return tuple(outs)

    @staticmethod
    def backward(ctx, *dY):
        *_, need_dx = ctx.needs_input_grad[:5]
        need_weights, need_biases, need_A, need_B, values = _in_parts(ctx.needs_input_grad[5:], 4, len(dY))
        takes_them = ctx.gradients is not None and all(need_A) and all(need_B) and not torch.is_grad_enabled()
        gradients = ctx.gradients() if takes_them else None
        dx, dA, dB = _differentiate(ctx, _EagerBackward.run, dY, need_dx, need_weights, need_biases, gradients)
        return None, None, None, None, dx, *[None] * (2 * len(dY)), *dA, *dB, *[None] * len(values)

    jvp = staticmethod(_refuse_forward_mode)


class _EagerBackward(torch.autograd.Function):
    @staticmethod
    def run(dY, x, S, counters, weights, A, B, values, *options):
        return _EagerBackward.apply(*options, len(dY), x, S, counters, *dY, *weights, *A, *B, *values)

    @staticmethod
    def forward(ctx, scaling, need_dx, path, num_maps, x, S, counters, *maps):
        dY, weights, A, B, values = _in_parts(maps, 4, num_maps)
        return tuple(_gradients(dY, x, S, counters, weights, A, B, values, scaling, need_dx, path))

    backward = staticmethod(_refuse_second_derivative)
    jvp = staticmethod(_refuse_forward_mode)


# what torch.compile and tensors without memory see: operators

_forward = torch.library.custom_op("renyi_kernels::lora_linears", _outputs, mutates_args=())
_backward = torch.library.custom_op("renyi_kernels::lora_linears_backward", _gradients, mutates_args=())


@_forward.register_fake
def _(x, weights, biases, A, B, values, scaling, path):
    K, M, R = A[0].shape[0], x.shape[-2], sum(a.shape[1] for a in A)
    outs = [x.new_empty((K, M, weight.shape[0])) for weight in weights]
    counters = lora_products.new_counters(lora_products.passes_of(path), x, B)
    return [*outs, x.new_empty((K, M, R) if x.dim() == 3 else (M, K, R)), counters]


@_backward.register_fake
def _(dY, x, S, counters, weights, A, B, values, scaling, need_dx, path):
    dA = _unwritten_block(A, _common_dtype(A))
    return [x.new_empty(x.shape if need_dx else 0), dA, *(b.new_empty(b.shape) for b in B)]


def _keep(ctx, inputs, output):
    x, weights, _, A, B, values, ctx.scaling, ctx.path = inputs
    ctx.save_for_backward(x, *output[-2:], *weights, *A, *B, *values)


def _differentiate_operator(ctx, gradients):
    need_dx, need_weights, need_biases, _, _, values, *_ = ctx.needs_input_grad
    dY = gradients[:-2]
    refuse_tangents("lora_linears", *dY)
    dx, dA, dB = _differentiate(ctx, _backward, dY, need_dx, need_weights, need_biases)
    return dx, [None] * len(dY), [None] * len(dY), dA, dB, [None] * len(values), None, None


_forward.register_autograd(_differentiate_operator, setup_context=_keep)
_backward.register_autograd(_refuse_second_derivative)
