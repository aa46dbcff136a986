"""Memory-bounded PyTorch paths, on any device. `renyi_reduce` needs none: its reference is already O(K B).

Layout: K particles, M rows, I/O in/out features, R rank, N labelled tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from renyi_kernels.reference import IGNORE_INDEX, at_least_fp32

# a block of a low-precision head is widened to fp32 on CPU, this many vocabulary rows at a time
_VOCAB_BLOCK = 8192


def grouped_lora(x: Tensor, A: Tensor, B: Tensor, scaling: float, base_out: Tensor | None) -> Tensor:
    """One batched product down, one up; the scaling and the sum ride on the second."""
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


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    logit_softcap: float | None,
    logit_scale: float,
    chunk_mib: float,
) -> Tensor:
    hidden = hidden.reshape(-1, hidden.shape[-1])
    settings = (logit_softcap, logit_scale, chunk_mib, hidden.requires_grad and torch.is_grad_enabled())
    # nothing of hidden but its place in the graph: a second derivative has to pass through it, and is refused there
    anchor = hidden[:0].clone()
    logprob: Tensor = _LinearLogprob.apply(hidden, weight, bias, labels.reshape(-1), settings, anchor)
    return logprob.view(labels.shape)


class _LinearLogprob(torch.autograd.Function):
    """Two GEMMs a chunk: logits, then G = d logp / d hidden. The backward only scales G by the token's gradient.

    With e = exp(z - max z) and S = sum e over the vocabulary, d logp / d z = onehot - e / S = -(e - S onehot) / S,
    formed in fp32 before it is rounded to the compute dtype.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, settings, anchor):
        *head, need_grad = settings
        with torch.autocast(hidden.device.type, enabled=False):
            rows = (labels != IGNORE_INDEX).nonzero().squeeze(-1)
            logprob = hidden.new_zeros(labels.shape, dtype=at_least_fp32(hidden.dtype))
            gradient = hidden.new_empty((rows.numel(), hidden.shape[1])) if need_grad else None
            _labelled_logprob(hidden, weight, bias, labels, rows, *head, logprob=logprob, gradient=gradient)
        ctx.save_for_backward(rows, gradient, anchor)
        ctx.hidden_shape = hidden.shape
        return logprob

    @staticmethod
    def backward(ctx, upstream):
        for name, needed in zip(("weight", "bias"), ctx.needs_input_grad[1:3], strict=True):
            if needed:
                raise RuntimeError(
                    f"linear_logprob: the head's {name} is taken as frozen, but a gradient of it was asked for; "
                    f"call {name}.requires_grad_(False), or use backend='reference'"
                )
        rows, gradient, anchor = ctx.saved_tensors
        return _ScaleGradient.apply(upstream, anchor, rows, gradient, ctx.hidden_shape), None, None, None, None, None


class _ScaleGradient(torch.autograd.Function):
    """G times the upstream gradient of its token, put back at the labelled rows; G is a constant."""

    @staticmethod
    def forward(ctx, upstream, anchor, rows, gradient, shape):
        grad_hidden = gradient.new_zeros(shape)
        grad_hidden[rows] = (gradient * upstream[rows, None]).to(gradient.dtype)
        return grad_hidden

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("linear_logprob: this path has no second derivative; use backend='reference'")


def _labelled_logprob(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    rows: Tensor,
    logit_softcap: float | None,
    logit_scale: float,
    chunk_mib: float,
    *,
    logprob: Tensor,
    gradient: Tensor | None,
) -> None:
    """Fill `logprob` (and `gradient`) for the labelled `rows`, never holding more than `chunk_mib` of logits."""
    wide = logprob.dtype
    narrow_copy = gradient is not None and hidden.dtype != wide
    bytes_per_logit = wide.itemsize
    bytes_per_logit += hidden.dtype.itemsize if narrow_copy else 0
    bytes_per_logit += wide.itemsize if logit_softcap is not None and gradient is not None else 0
    vocabulary = weight.shape[0]
    chunk = max(1, int(chunk_mib * 2**20) // (vocabulary * bytes_per_logit))
    chunk = min(chunk, rows.numel())
    # one set of buffers serves every chunk: a fresh allocation each time costs as much as the arithmetic
    logits_buffer = hidden.new_empty((chunk, vocabulary), dtype=wide)
    narrow_buffer = hidden.new_empty((chunk, vocabulary)) if narrow_copy else None
    for start in range(0, rows.numel(), max(chunk, 1)):
        part = rows[start : start + chunk]
        z = logits_buffer[: part.numel()]
        _logits_into(z, hidden[part], weight)
        if bias is not None:
            z.add_(bias)
        if logit_scale != 1.0:
            z.mul_(logit_scale)
        slope = None  # d softcap(z) / d z
        if logit_softcap is not None:
            z.div_(logit_softcap).tanh_()
            if gradient is not None:
                slope = torch.square(z).neg_().add_(1.0)
            z.mul_(logit_softcap)
        target = labels[part, None]
        peak = z.amax(dim=1, keepdim=True)
        z_target = z.gather(1, target)
        e = z.sub_(peak).exp_()
        total = e.sum(dim=1, keepdim=True)
        logprob[part] = (z_target - peak - total.log()).squeeze(1)
        if gradient is None:
            continue
        e.scatter_add_(1, target, -total)
        if slope is not None:
            e.mul_(slope)
        factor = -logit_scale / total
        part_gradient = gradient[start : start + chunk]
        if narrow_buffer is None:
            torch.mm(e, weight, out=part_gradient).mul_(factor)
        else:
            narrow = narrow_buffer[: part.numel()].copy_(e.mul_(factor))
            torch.mm(narrow, weight, out=part_gradient)


def _logits_into(out: Tensor, hidden: Tensor, weight: Tensor) -> None:
    """out = hidden weight^T with fp32 accumulation and fp32 output.

    Rounding logits to bf16 would cost about 0.04 nats a token, and that perturbs the responsibilities.
    """
    if hidden.dtype == out.dtype:
        torch.mm(hidden, weight.mT, out=out)
    elif hidden.device.type == "cuda":
        torch.mm(hidden, weight.mT, out_dtype=out.dtype, out=out)
    else:
        hidden = hidden.to(out.dtype)
        with _fp32_matmul_of_bf16_values(weight.dtype):
            for v in range(0, weight.shape[0], _VOCAB_BLOCK):
                block = weight[v : v + _VOCAB_BLOCK]
                torch.mm(hidden, block.to(out.dtype).mT, out=out[:, v : v + _VOCAB_BLOCK])


@contextmanager
def _fp32_matmul_of_bf16_values(source: torch.dtype) -> Iterator[None]:
    """Let oneDNN multiply fp32 matrices in bf16: exact where both came from bf16, and keeps the fp32 output."""
    if source != torch.bfloat16:
        yield
        return
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before
