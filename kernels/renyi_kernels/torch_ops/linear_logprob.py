"""What linear_logprob does between its two matrix products, in plain PyTorch, on any device.

Layout: N rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

# a CPU works on a few rows at a time: so many bytes of them stay in its cache
_CACHED_BYTES = 8 * 2**20


def logprob_pass(
    products: Tensor,
    target: Tensor,
    bias: Tensor | None,
    logit_softcap: float | None,
    logit_scale: float,
    gradient_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:
    """The log-probability [N] of each row's target, and its gradient [N, V] with respect to the raw products h W^T.

    The gradient is written into the memory of `products` [N, V]. If `gradient_dtype` is None, there is no gradient.
    """
    N, V = products.shape
    logprob = products.new_empty(N)
    gradient = None if gradient_dtype is None else products.view(gradient_dtype)[:, :V]
    rows = max(N, 1)
    if products.device.type == "cpu":
        rows = max(1, _CACHED_BYTES // (V * products.element_size()))
    narrow = gradient is not None and gradient.dtype != products.dtype
    rounded = products.new_empty((min(rows, N), V), dtype=gradient_dtype) if narrow else None
    for start in range(0, N, rows):
        some = slice(start, start + rows)
        logits = products[some]
        logprob[some] = _some_rows(logits, target[some], bias, logit_softcap, logit_scale, gradient is not None)
        if gradient is not None and rounded is not None:
            # rounded in a buffer first, because the rounded values go to where the values are read from
            gradient[some] = rounded[: len(logits)].copy_(logits)
    return logprob, gradient


def _some_rows(
    z: Tensor,
    target: Tensor,
    bias: Tensor | None,
    logit_softcap: float | None,
    logit_scale: float,
    need_grad: bool,
) -> Tensor:
    """The log-probability [n]. Its gradient takes the place of z [n, V].

    With e = exp(z - max z) and S = sum e over the vocabulary, d logp / d z = onehot - e / S = -(e - S onehot) / S.
    """
    target = target[:, None]
    if bias is not None:
        z.add_(bias)
    if logit_scale != 1.0:
        z.mul_(logit_scale)
    slope = None  # d softcap(z) / d z
    if logit_softcap is not None:
        z.div_(logit_softcap).tanh_()
        if need_grad:
            slope = torch.square(z).neg_().add_(1.0)
        z.mul_(logit_softcap)
    peak = z.amax(dim=1, keepdim=True)
    z_target = z.gather(1, target)
    e = z.sub_(peak).exp_()
    total = e.sum(dim=1, keepdim=True)
    if need_grad:
        e.scatter_add_(1, target, -total)
        if slope is not None:
            e.mul_(slope)
        e.mul_(-logit_scale / total)
    return (z_target - peak - total.log()).squeeze(1)
