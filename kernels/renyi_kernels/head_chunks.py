"""A frozen language-model head, chunk of tokens by chunk: logits, a pass over them, and the gradient. All paths use it.

Layout: N tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from renyi_kernels.reference import IGNORE_INDEX, at_least_fp32
from renyi_kernels.torch_ops.linear_logprob import logprob_pass as torch_pass

# Whether the Triton path writes exponentials from within the first product, and no logits
# (`triton_ops/linear_logprob_gemm.py`). It is off until a GPU has shown that this is faster
PRODUCT_WITH_EPILOGUE = False
_ROWS_OF_A_TILE = 128
# on a CPU more rows at once are not faster, and they do not stay in its cache
_MOST_ROWS_ON_CPU = 256
# without CUDA, a head in low precision is converted to fp32, so many rows of the vocabulary at a time
_VOCAB_BLOCK = 8192
# oneDNN on AMX reads a row of a bf16 matrix to the end of a tile, beyond its last column. What it reads there is
# multiplied by zero, but NaN times zero is NaN
_TILE = 32


def pass_of(path: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The function `logprob_pass` of a path."""
    if path == "torch":
        return torch_pass
    from renyi_kernels.triton_ops.linear_logprob import logprob_pass  # needs triton

    return logprob_pass


def linear_logprob(
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
    """(logprob [N], G [N, D] = d logprob / d hidden) of hidden [N, D]. G is empty if it is not needed. Where there is
    no label, both are 0.

    A chunk takes two matrix products and at most `chunk_mib` of logits. Only rows with a label take part. If
    `all_labelled`, these are all rows, and nothing looks for them.
    """
    (N, D), V = hidden.shape, weight.shape[0]
    logprob = hidden.new_zeros(N, dtype=at_least_fp32(hidden.dtype))
    gradient = hidden.new_zeros((N, D) if need_grad else (0, D))
    rows, num_rows = None, N
    if not all_labelled:
        rows = (labels != IGNORE_INDEX).nonzero().squeeze(-1).to(hidden.device, non_blocking=True)
        num_rows = rows.numel()
    chunk = min(rows_per_chunk(hidden, V, chunk_mib, logit_softcap is not None, need_grad), num_rows)
    labels = labels.to(hidden.device, non_blocking=True)
    if PRODUCT_WITH_EPILOGUE and path == "triton":
        chunk = min(_rows_with_epilogue(hidden, V, chunk_mib), num_rows)
        for start in range(0, num_rows, max(chunk, 1)):
            end = min(start + chunk, num_rows)
            part = slice(start, end) if rows is None else rows[start:end]
            of_part = _with_epilogue(hidden[part], weight, labels[part], bias, logit_softcap, logit_scale, need_grad)
            logprob[part], gradient[part if need_grad else slice(0)] = of_part
        return logprob, gradient
    # all chunks use the same buffers: to allocate new ones each time would cost as much as the arithmetic
    buffer = hidden.new_empty((chunk, V), dtype=logprob.dtype)
    widened = None
    if hidden.device.type != "cuda" and weight.dtype != buffer.dtype:
        widened = buffer.new_empty((min(_VOCAB_BLOCK, V), D))
    for start in range(0, num_rows, max(chunk, 1)):
        end = min(start + chunk, num_rows)
        part = slice(start, end) if rows is None else rows[start:end]
        products = buffer[: end - start]
        _products_into(products, hidden[part], weight, widened)
        head = (bias, logit_softcap, logit_scale)
        logprob[part], slope = pass_of(path)(products, labels[part], *head, hidden.dtype if need_grad else None)
        if slope is not None:
            if slope.device.type == "cpu" and slope.dtype != products.dtype:
                # beside the gradient in this memory stand halves of old fp32 values
                products.view(slope.dtype)[:, V : V + _TILE].zero_()
            gradient[part] = slope @ weight
    return logprob, gradient


def rows_per_chunk(hidden: Tensor, num_vocabulary: int, chunk_mib: float, softcap: bool, need_grad: bool) -> int:
    """How many rows a chunk has: as many as fit into `chunk_mib` with their logits and what the torch path copies of
    these, and at least one."""
    wide = at_least_fp32(hidden.dtype).itemsize
    bytes_per_logit = wide
    if need_grad:
        bytes_per_logit += (hidden.dtype.itemsize if hidden.dtype.itemsize < wide else 0) + (wide if softcap else 0)
    rows = max(1, int(chunk_mib * 2**20) // (num_vocabulary * bytes_per_logit))
    return min(rows, _MOST_ROWS_ON_CPU) if hidden.device.type == "cpu" else rows


def _rows_with_epilogue(hidden: Tensor, num_vocabulary: int, chunk_mib: float) -> int:
    rows = max(1, int(chunk_mib * 2**20) // (num_vocabulary * hidden.dtype.itemsize))
    return rows if rows < _ROWS_OF_A_TILE else rows // _ROWS_OF_A_TILE * _ROWS_OF_A_TILE


def _with_epilogue(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    logit_softcap: float | None,
    logit_scale: float,
    need_grad: bool,
) -> tuple[Tensor, Tensor]:
    """(logprob [n], its gradient [n, D]) of a few rows. Without `need_grad` the gradient is empty."""
    from renyi_kernels.triton_ops.linear_logprob_gemm import logprob_product

    (n, D), V = hidden.shape, weight.shape[0]
    # rows of E begin at multiples of 64 bytes
    E = hidden.new_empty((n, -(-V // _TILE) * _TILE))[:, :V] if need_grad else None
    logprob, a, b = logprob_product(hidden, weight, target, bias, logit_softcap, logit_scale, E)
    if E is None or a is None or b is None:
        return logprob, hidden.new_empty((0, D))
    if E.dtype == logprob.dtype or E.device.type != "cuda":
        gradient = torch.mm(E.to(logprob.dtype), weight.to(logprob.dtype))
    else:
        gradient = torch.mm(E, weight, out_dtype=logprob.dtype)
    gradient.mul_(-b[:, None]).addcmul_(a[:, None], weight[target.clamp(0, V - 1)])
    return logprob, gradient.to(hidden.dtype)


def _products_into(out: Tensor, hidden: Tensor, weight: Tensor, widened: Tensor | None) -> None:
    """out = hidden weight^T, accumulated and kept in fp32. `widened`, if given, is a buffer for blocks of the weight.

    Logits rounded to bf16 would be wrong by about 0.04 nats a token, and that would disturb the responsibilities.
    """
    if hidden.dtype == out.dtype:
        torch.mm(hidden, weight.mT, out=out)
    elif widened is None:
        torch.mm(hidden, weight.mT, out_dtype=out.dtype, out=out)
    else:
        # oneDNN could multiply these values in bf16 without a loss. But that takes a setting of the whole process, and
        # with it the products of other threads would lose digits
        hidden = hidden.to(out.dtype)
        for logits, block in zip(out.split(len(widened), dim=1), weight.split(len(widened)), strict=True):
            torch.mm(hidden, widened[: len(block)].copy_(block).mT, out=logits)
