"""What linear_logprob does beside its two matrix products, in plain PyTorch, on any device.

Layout: N rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

# a CPU works on a few rows at a time: so many bytes of them stay in its cache
_CACHED_BYTES = 2 * 2**20


def logprob_pass(
    products: Tensor,
    target: Tensor,
    bias: Tensor | None,
    logit_softcap: float | None,
    logit_scale: float,
    E: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(logprob [N] of each row's target y, a [N], b [N]), and E [N, V], with ``d logprob / d h = a w_y - b E W``.

    The raw products h W^T [N, V] are lost. E is written over them if it is the same tensor, and then it holds all of
    w_y's part too, and a is None. Without an E there is no gradient, and neither a nor b.
    """
    N, V = products.shape
    rows = max(N, 1)
    if products.device.type == "cpu":
        rows = max(1, _CACHED_BYTES // (V * products.element_size()))
    logprob = products.new_empty(N)
    a = None if E is None or E is products else torch.empty_like(logprob)
    b = None if E is None else torch.empty_like(logprob)
    for start in range(0, N, rows):
        some = slice(start, start + rows)
        z, y = products[some], target[some, None]
        slope = _logits(z, bias, logit_softcap, logit_scale, E is not None)
        z_y, top = z.gather(1, y), z.amax(dim=1, keepdim=True)
        e = z.sub_(top).exp_()
        e_y = e.gather(1, y)
        S = e.scatter_(1, y, 0.0).sum(dim=1, keepdim=True)
        # where the target is the top itself, this is log1p(S): it keeps the digits of a small S
        logprob[some] = (z_y - top - torch.log1p(e_y - 1.0 + S)).squeeze(1)
        if E is None or b is None:
            continue
        of_target, sum_E, total = S, S, e_y + S
        if slope is not None:
            of_target = S * slope.gather(1, y)
            sum_E = e.mul_(slope).sum(dim=1, keepdim=True)
        if a is None:
            e.scatter_(1, y, -of_target)
            b[some] = (logit_scale / total).squeeze(1)
        else:
            unit = torch.ones_like(S)
            if E.dtype == torch.float16:  # divided by S, it holds E and its sums, however likely the target is
                unit = S.clamp(min=torch.finfo(S.dtype).tiny)
                e.mul_(1.0 / unit)
            rounded = E[some].copy_(e)
            # E_y is minus the others' sum, so this row adds up to almost nothing: to what rounding has changed in it.
            # Rows w_v of a head have much in common. If w_y's coefficient takes that in, errors of rounding multiply
            # only the differences w_y - w_v
            rounded.scatter_(1, y, (-sum_E / unit).to(E.dtype))
            factor = logit_scale * unit / total
            a[some] = (factor * ((of_target - sum_E) / unit + rounded.sum(dim=1, keepdim=True))).squeeze(1)
            b[some] = factor.squeeze(1)
    return logprob, a, b


def _logits(
    z: Tensor, bias: Tensor | None, logit_softcap: float | None, logit_scale: float, need_slope: bool
) -> Tensor | None:
    """Makes logits of raw products z, in place. Returns the derivative of the soft cap, if there is one."""
    if bias is not None:
        z.add_(bias)
    if logit_scale != 1.0:
        z.mul_(logit_scale)
    slope = None
    if logit_softcap is not None:
        z.div_(logit_softcap).tanh_()
        if need_slope:
            slope = torch.square(z).neg_().add_(1.0)
        z.mul_(logit_softcap)
    return slope


def gradient_pass(P: Tensor, weight: Tensor, target: Tensor, a: Tensor | None, b: Tensor, out: Tensor) -> None:
    """out = a w_y - b P, with P = E W [N, D]."""
    G = P * -b[:, None]
    if a is not None:
        G.addcmul_(a[:, None], weight[target])
    out.copy_(G)
