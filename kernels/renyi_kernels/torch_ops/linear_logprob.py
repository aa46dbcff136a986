"""What happens between the two matrix products of linear_logprob, in plain PyTorch, on any device.

Layout: N rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

# rows are worked a few at a time on CPU: what this many bytes of them hold stays in its cache
_CACHED_BYTES = 8 * 2**20


def logprob_pass(
    products: Tensor,
    target: Tensor,
    bias: Tensor | None,
    logit_softcap: float | None,
    logit_scale: float,
    gradient_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability [N] of each row's target, and its gradient [N, V] with respect to the raw products h W^T.

    `products` [N, V] is overwritten; in its own dtype, the gradient is given in its memory. No gradient for None.
    """
    logprob = products.new_empty(len(products))
    gradient = products if gradient_dtype == products.dtype else None
    if gradient_dtype is not None and gradient is None:
        gradient = torch.empty_like(products, dtype=gradient_dtype)
    rows = len(products)
    if products.device.type == "cpu":
        rows = max(1, _CACHED_BYTES // (products.shape[1] * products.element_size()))
    for start in range(0, len(products), max(rows, 1)):
        some = slice(start, start + rows)
        out = None if gradient is None else gradient[some]
        _some_rows(products[some], target[some], bias, logit_softcap, logit_scale, logprob[some], out)
    return logprob, gradient


def _some_rows(
    z: Tensor,
    target: Tensor,
    bias: Tensor | None,
    logit_softcap: float | None,
    logit_scale: float,
    logprob: Tensor,
    gradient: Tensor | None,
) -> None:
    """With e = exp(z - max z) and S = sum e over the vocabulary, d logp / d z = onehot - e / S = -(e - S onehot) / S,
    formed before it is rounded to the dtype of `gradient`."""
    target = target[:, None]
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
    peak = z.amax(dim=1, keepdim=True)
    z_target = z.gather(1, target)
    e = z.sub_(peak).exp_()
    total = e.sum(dim=1, keepdim=True)
    logprob.copy_((z_target - peak - total.log()).squeeze(1))
    if gradient is None:
        return
    e.scatter_add_(1, target, -total)
    if slope is not None:
        e.mul_(slope)
    e.mul_(-logit_scale / total)
    if gradient.dtype != e.dtype:
        gradient.copy_(e)
