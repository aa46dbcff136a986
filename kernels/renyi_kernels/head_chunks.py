"""A frozen language-model head, chunk of tokens by chunk: logits, a pass over them, and the gradient. All paths use it.

Layout: N tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from renyi_kernels.reference import IGNORE_INDEX, at_least_fp32
from renyi_kernels.torch_ops import linear_logprob as torch_passes

# Whether the Triton path writes exponentials from within the first product, and no logits
# (`triton_ops/linear_logprob_gemm.py`). It is off until a GPU has shown that this is faster
PRODUCT_WITH_EPILOGUE = False
# on a CPU more rows at once are not faster, and they do not stay in its cache
_MOST_ROWS_ON_CPU = 256
# without CUDA, a head in low precision is converted to fp32, so many rows of the vocabulary at a time
_VOCAB_BLOCK = 8192
# Rows of V numbers begin at multiples of so many, as loads and matrix units want them. Zeros stand between the rows,
# because oneDNN on AMX reads a row of a bf16 matrix to the end of a tile, beyond its last column. What it reads there
# is multiplied by zero, but NaN times zero is NaN
_TILE = 32


def passes_of(path: str) -> ModuleType:
    """The module with the passes of a path, `logprob_pass` and `gradient_pass`."""
    if path == "torch":
        return torch_passes
    from renyi_kernels.triton_ops import linear_logprob as triton_passes  # needs triton

    return triton_passes


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

    A chunk takes two matrix products and at most `chunk_mib` of logits and copies of them. Only rows with a label take
    part. If `all_labelled`, these are all rows, and nothing looks for them.

    The two products are h W^T and E W. E holds the exponentials of a row's logits relative to its target y, and
    G = a w_y - b E W, with two numbers a and b for each row. This form subtracts no nearly equal numbers.
    """
    (N, D), V = hidden.shape, weight.shape[0]
    logprob = hidden.new_zeros(N, dtype=at_least_fp32(hidden.dtype))
    gradient = hidden.new_zeros((N, D) if need_grad else (0, D))
    rows, num_rows = None, N
    if not all_labelled:
        rows = (labels != IGNORE_INDEX).nonzero().squeeze(-1).to(hidden.device, non_blocking=True)
        num_rows = rows.numel()
    in_one = PRODUCT_WITH_EPILOGUE and path == "triton"
    most = rows_per_chunk(hidden, V, chunk_mib, logit_softcap is not None, need_grad, path, has_logits=not in_one)
    chunk = min(most, num_rows)
    labels = labels.to(hidden.device, non_blocking=True)
    # all chunks use the same buffers: to allocate new ones each time would cost as much as the arithmetic
    products = _aligned(hidden, 0 if in_one else chunk, V, logprob.dtype)
    E = None
    if need_grad:
        over = _over_the_products(hidden.dtype, path)
        E = products if over else _aligned(hidden, chunk, V, hidden.dtype)
    widened = None
    if hidden.device.type != "cuda" and weight.dtype != products.dtype:
        widened = products.new_empty((min(_VOCAB_BLOCK, V), D))
    passes = passes_of(path)
    for start in range(0, num_rows, max(chunk, 1)):
        end = min(start + chunk, num_rows)
        part = slice(start, end) if rows is None else rows[start:end]
        some_products, targets = products[: end - start], labels[part]
        some_E = some_products if E is products else E if E is None else E[: end - start]
        head = (bias, logit_softcap, logit_scale)
        if in_one:
            logprob[part], a, b = _logprob_product(hidden[part], weight, targets, *head, some_E)
        else:
            _products_into(some_products, hidden[part], weight, widened)
            logprob[part], a, b = passes.logprob_pass(some_products, targets, *head, some_E)
        if some_E is not None:
            into = gradient[part]
            passes.gradient_pass(_times_weight(some_E, weight, path), weight, targets, a, b, into)
            if rows is not None:  # then it is a copy
                gradient[part] = into
    return logprob, gradient


def _over_the_products(dtype: torch.dtype, path: str) -> bool:
    """Whether E takes the place of the products."""
    return path == "torch" and dtype == at_least_fp32(dtype)


def _logprob_product(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    from renyi_kernels.triton_ops.linear_logprob_gemm import logprob_product  # needs triton

    return logprob_product(*arguments)


def rows_per_chunk(
    hidden: Tensor,
    num_vocabulary: int,
    chunk_mib: float,
    softcap: bool,
    need_grad: bool,
    path: str,
    *,
    has_logits: bool = True,
) -> int:
    """How many rows a chunk has: as many as fit into `chunk_mib` with their logits, with E, and with what the torch
    path keeps of a soft cap; and at least one."""
    wide = at_least_fp32(hidden.dtype).itemsize
    bytes_per_logit = wide if has_logits or not need_grad else 0
    if need_grad:
        bytes_per_logit += 0 if _over_the_products(hidden.dtype, path) else hidden.dtype.itemsize
        bytes_per_logit += wide if softcap and path == "torch" else 0
    rows = max(1, int(chunk_mib * 2**20) // (num_vocabulary * bytes_per_logit))
    return min(rows, _MOST_ROWS_ON_CPU) if hidden.device.type == "cpu" else rows


def _aligned(like: Tensor, num_rows: int, num_vocabulary: int, dtype: torch.dtype) -> Tensor:
    """An empty [num_rows, V] with aligned rows, and with zeros between these."""
    memory = like.new_empty((num_rows, -(-num_vocabulary // _TILE) * _TILE), dtype=dtype)
    memory[:, num_vocabulary:].zero_()
    return memory[:, :num_vocabulary]


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


def _times_weight(E: Tensor, weight: Tensor, path: str) -> Tensor:
    """E W, accumulated in fp32, and kept in fp32 where that costs nothing."""
    if E.dtype == at_least_fp32(E.dtype):
        return torch.mm(E, weight)
    if E.device.type == "cuda":
        return torch.mm(E, weight, out_dtype=torch.float32)
    # on a CPU the torch path has put the large part of w_y into E, so little is lost when the sum is rounded. Triton's
    # interpreter stands for a GPU
    return torch.mm(E, weight) if path == "torch" else torch.mm(E.float(), weight.float())
