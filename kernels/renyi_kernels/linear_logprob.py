"""linear_logprob: log-probabilities of labels under a frozen language-model head, without keeping the logits.

Layout: N tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from renyi_kernels import head_chunks, reference
from renyi_kernels.backend import refuse_tangents, resolve
from renyi_kernels.reference import IGNORE_INDEX, at_least_fp32

CHUNK_MIB = 256.0
# a soft cap above 1e30 would change no logit, and one below 1e-30 would make all logits equal; fp32 holds the values
# between these, and their products with an upstream gradient
_SOFTCAPS = 1e-30, 1e30


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_mib: float = CHUNK_MIB,
    all_labelled: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Log-probability, in nats, of each label: ``log softmax(z)[label]``, ``z = softcap(scale * (h W^T + b))``.

    ``softcap(z) = c tanh(z / c)`` (Gemma-2). The head is frozen: there is no gradient of `weight` or `bias`. So the
    forward computes d logp / d hidden, chunk by chunk, and the backward only scales it. Logits are accumulated and kept
    in fp32, whatever the dtype of the inputs is.

    Args:
        hidden: ``[..., D]``, final-norm output.
        weight: ``[V, D]``, in the dtype of hidden. bias: ``[V]`` or None.
        labels: ``[...]`` int64, already shifted to the position that predicts them. -100 is no label: the result
            there is 0.0, and no work is done. Labels may lie on the CPU while hidden lies on the GPU. Then the op does
            not wait for the device; with labels on the GPU it waits once, to find those that count.
        logit_softcap: c from 1e-30 to 1e30, or None. logit_scale: multiplies the logits; at most 1e30.
        chunk_mib: how many MiB of logits and copies of them exist at a time, except on the "reference" path. Without
            CUDA, a head in low precision takes 8192 of its rows in fp32 besides.
        all_labelled: True promises that no label is -100. Then the op does not look for labels, and it never waits for
            the device, wherever they lie. A -100 is then like any token id that is not in the vocabulary: a ValueError
            for labels on the CPU; for labels on a GPU the kernels give NaN.
        backend: "auto", "triton", "torch" or "reference"; None takes that of `use_backend`.

    Returns:
        Log-probabilities in the shape of labels, fp32 (fp64 for an fp64 hidden), differentiable once in hidden. A
        second derivative or forward mode raises a RuntimeError, except with ``backend="reference"``, which has
        derivatives of any order.

    Raises:
        ValueError: a shape or value does not fit. TypeError: a dtype does not.
        RuntimeError: in the backward, if the weight or the bias requires a gradient.
    """
    _check(hidden, weight, labels, bias, logit_softcap, logit_scale, chunk_mib)
    path = resolve("linear_logprob", hidden, backend)
    head = (bias, logit_softcap, float(logit_scale))
    if path == "reference":
        _check_labels(labels, weight.shape[0], all_labelled)
        return reference.linear_logprob(hidden, weight, labels.to(hidden.device), *head)
    refuse_tangents("linear_logprob", hidden, weight, bias)
    need_grad = torch.is_grad_enabled() and hidden.requires_grad
    rows = hidden.reshape(-1, hidden.shape[-1])
    how = (float(chunk_mib), all_labelled, need_grad, path)
    logprob: Tensor = _forward(rows, weight, labels.reshape(-1), *head, *how)[0]
    return logprob.view(labels.shape)


def _check(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    logit_softcap: float | None,
    logit_scale: float,
    chunk_mib: float,
) -> None:
    if not hidden.is_floating_point():
        raise TypeError(f"hidden: expected a floating dtype; got {hidden.dtype}")
    if weight.dim() != 2 or hidden.dim() < 1 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight: expected [V, D] with D the last size of hidden {list(hidden.shape)}; got {list(weight.shape)}"
        )
    if 0 in weight.shape:
        raise ValueError(f"weight: expected [V, D], each at least 1; got {list(weight.shape)}")
    if weight.dtype != hidden.dtype:
        raise TypeError(f"weight: expected the dtype of hidden, {hidden.dtype}; got {weight.dtype}; cast it once")
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(f"labels: expected the shape {list(hidden.shape[:-1])}; got {list(labels.shape)}")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels: expected int64; got {labels.dtype}; use labels.long()")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias: expected [V] = [{weight.shape[0]}]; got {list(bias.shape)}")
    if bias is not None and not bias.is_floating_point():
        raise TypeError(f"bias: expected a floating dtype; got {bias.dtype}")
    lowest, highest = _SOFTCAPS
    if logit_softcap is not None and not lowest <= logit_softcap <= highest:
        raise ValueError(f"logit_softcap: expected a number from {lowest} to {highest}, or None; got {logit_softcap}")
    if not abs(logit_scale) <= highest:
        raise ValueError(f"logit_scale: expected a number from -{highest} to {highest}; got {logit_scale}")
    if not (chunk_mib > 0 and math.isfinite(chunk_mib)):
        raise ValueError(f"chunk_mib: expected a finite number of MiB above 0; got {chunk_mib}")


def _check_labels(labels: Tensor, num_vocabulary: int, all_labelled: bool) -> None:
    # on a GPU this check would wait for the device; there the log-probability of an unknown label is NaN
    if labels.device.type == "cpu" and labels.numel():
        unknown = (labels < 0) | (labels >= num_vocabulary)
        if not all_labelled:
            unknown &= labels != IGNORE_INDEX
        stray = labels[unknown]
        if stray.numel():
            no_label, remedy = ("", ", or all_labelled=False for labels of -100") if all_labelled else ("-100 or ", "")
            raise ValueError(
                f"labels: expected {no_label}a token id in [0, {num_vocabulary}); got {int(stray[0])}; "
                f"use the tokenizer that belongs to this model{remedy}"
            )


# one operator for autograd and torch.compile; hidden [N, D], labels [N]. Returns logprob [N] and d logprob / d hidden


@torch.library.custom_op("renyi_kernels::linear_logprob", mutates_args=())
def _forward(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    logit_softcap: float | None,
    logit_scale: float,
    chunk_mib: float,
    all_labelled: bool,
    need_grad: bool,
    path: str,
) -> tuple[Tensor, Tensor]:
    _check_labels(labels, weight.shape[0], all_labelled)
    with torch.autocast(hidden.device.type, enabled=False):
        return head_chunks.linear_logprob(
            hidden, weight, labels, bias, logit_softcap, logit_scale, chunk_mib, all_labelled, need_grad, path
        )


@_forward.register_fake
def _(hidden, weight, labels, bias, logit_softcap, logit_scale, chunk_mib, all_labelled, need_grad, path):
    N, D = hidden.shape
    logprob = hidden.new_empty(N, dtype=at_least_fp32(hidden.dtype))
    return logprob, hidden.new_empty((N, D) if need_grad else (0, D))


@torch.library.custom_op("renyi_kernels::linear_logprob_backward", mutates_args=())
def _backward(upstream: Tensor, gradient: Tensor, labels: Tensor) -> Tensor:
    """The gradient [N, D] of each token times its upstream gradient [N], in one pass, rounded once."""
    # no product with zero, because the upstream gradient of a token without a label may be infinite
    labelled = (labels != IGNORE_INDEX).to(upstream.device, non_blocking=True)
    upstream = upstream.where(labelled, 0.0)
    return torch.mul(gradient, upstream[:, None], out=torch.empty_like(gradient))


@_backward.register_fake
def _(upstream: Tensor, gradient: Tensor, labels: Tensor) -> Tensor:
    return torch.empty_like(gradient)


def _keep(ctx, inputs, output):
    ctx.save_for_backward(output[1], inputs[2])


def _differentiate(ctx, upstream, _):
    refuse_tangents("linear_logprob", upstream)
    need_hidden, need_weight, _, need_bias, *_ = ctx.needs_input_grad
    for name, needed in (("weight", need_weight), ("bias", need_bias)):
        if needed:
            raise RuntimeError(
                f"linear_logprob: the head's {name} is taken as frozen, but it requires a gradient; call "
                f"{name}.requires_grad_(False), or use backend='reference'"
            )
    gradient, labels = ctx.saved_tensors
    return (_backward(upstream, gradient, labels) if need_hidden else None, *[None] * 9)


def _refuse_second_derivative(ctx, *_):
    raise RuntimeError("linear_logprob: this path has no second derivative; use backend='reference'")


_forward.register_autograd(_differentiate, setup_context=_keep)
_backward.register_autograd(_refuse_second_derivative)
