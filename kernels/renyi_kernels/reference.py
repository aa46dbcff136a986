"""The ops, naive and obvious: plain differentiable PyTorch without chunks or tricks.

This is the only reference. Tests compare every other path with it (in fp64, which they call gold), and benchmarks
compare their times with it.

Layout: K particles, B sequences, T tokens, M rows, I/O in/out features, R rank, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

IGNORE_INDEX = -100


def grouped_lora(x: Tensor, A: Tensor, B: Tensor, scaling: float, base_out: Tensor | None) -> Tensor:
    """base_out + scaling * (x A_k^T) B_k^T for every particle k."""
    delta = scaling * (x @ A.mT) @ B.mT
    return delta if base_out is None else base_out + delta


def lora_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    scaling: float,
) -> list[Tensor]:
    """x W_j^T + b_j + scaling * (x A_jk^T) B_jk^T for every map j and particle k."""
    outs = []
    for weight, bias, a, b in zip(weights, biases, A, B, strict=True):
        base = torch.nn.functional.linear(x, weight, bias)
        outs.append(grouped_lora(x, a.to(x.dtype), b.to(x.dtype), scaling, base))
    return outs


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    logit_softcap: float | None,
    logit_scale: float,
) -> Tensor:
    """log softmax(logits)[label], with logits = softcap(scale * (h W^T + b)); 0 where the label is -100."""
    logits = hidden @ weight.mT
    logits = logits.to(at_least_fp32(logits.dtype))
    if bias is not None:
        logits = logits + bias.to(logits.dtype)
    logits = logit_scale * logits
    if logit_softcap is not None:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    labelled = labels != IGNORE_INDEX
    targets = torch.where(labelled, labels, 0).unsqueeze(-1)
    logprob = torch.log_softmax(logits, dim=-1).gather(-1, targets).squeeze(-1)
    return torch.where(labelled, logprob, 0.0)


def renyi_reduce(logp: Tensor, alpha: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(loss [B], responsibilities [K, B], ess [B]) of sequence log-likelihoods logp [K, B]: (6), (8), 3.4.

    loss = -m - (1/alpha) log1p(mean_k expm1(alpha (s_k - m))) with m = max_k s_k. It neither overflows nor loses
    digits. The value does not depend on m, so derivatives of every order take m as a constant. [K, B] is tiny, so it is
    always computed in fp64. Nothing asks for the value of alpha: the formula and the mean, its limit at alpha = 0, are
    both computed, and `where` takes one.
    """
    s = logp.double()
    if not isinstance(alpha, Tensor):
        alpha = torch.full((), alpha, dtype=s.dtype, device=s.device)
    independent = alpha == 0.0
    impossible = torch.isneginf(s).all(dim=0)  # no particle gives the example any mass
    m = s.detach().amax(dim=0)
    # where the formula is not used, its input is 0, so that neither 0 * inf nor NaN comes out of its derivative
    scores = alpha * torch.where(independent | impossible, 0.0, s - m)
    excess = torch.expm1(scores).mean(dim=0)
    loss = -m - torch.log1p(excess) / torch.where(independent, 1.0, alpha)
    loss = torch.where(independent, -s.mean(dim=0), loss)
    # a constant, because the gradient of an impossible example is zero; NaN if alpha is NaN
    loss = torch.where(impossible, alpha + torch.inf, loss)
    responsibilities = torch.softmax(scores.detach(), dim=0)
    ess = 1.0 / responsibilities.square().sum(dim=0)
    dtype = at_least_fp32(logp.dtype)
    return loss.to(dtype), responsibilities.to(dtype), ess.to(dtype)


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
