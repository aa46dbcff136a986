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
SUM_TOLERANCE = 1e-6
"""How far from 1 the sum of the particles' weights may be."""


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


def renyi_reduce(logp: Tensor, alpha: float | Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(loss [B], responsibilities [K, B], ess [B]) of sequence log-likelihoods logp [K, B]: (6), (8), 3.4.

    loss = -m - (1/alpha) log1p(sum_k w_k expm1(alpha (s_k - m))), where m is the largest s_k of the particles with
    w_k > 0. It neither overflows nor loses digits, unless the particle that explains an example best has almost no
    weight: then log1p's argument is close to -1, and log(sum_k exp(log w_k + alpha (s_k - m))) takes its place. The
    value does not depend on m, so derivatives of every order take m as a constant. [K, B] is tiny, so it is always
    computed in fp64. Nothing asks for the value of alpha: the formula and the mean, its limit at alpha = 0, are both
    computed, and `where` takes one.

    weights [K] are divided by their largest one, so equal weights become exactly 1, and the result is that of
    weights=None (1/K each), bit for bit. Weights that are no distribution make everything NaN. The loss is
    differentiable in weights above 0 too.
    """
    s = logp.double()
    if not isinstance(alpha, Tensor):
        alpha = torch.full((), alpha, dtype=s.dtype, device=s.device)
    relative = s.new_ones(len(s), 1) if weights is None else relative_weights(weights)[:, None]
    total, has_weight = relative.sum(), relative != 0.0
    s = torch.where(has_weight, s, -torch.inf)
    independent = alpha == 0.0
    impossible = torch.isneginf(s).all(dim=0)  # no particle with a weight gives the example any mass
    m = s.detach().amax(dim=0)
    # where a formula is not used, its input is 0, so that neither 0 * inf nor NaN comes out of its derivative
    scores = alpha * torch.where(independent | impossible, 0.0, s - m)
    log_mass = scores + relative.log()  # of each particle; the responsibilities are in proportion to the mass
    excess = (relative * torch.expm1(scores)).sum(dim=0) / total
    loses_digits = 1.0 + excess < 0.5 / len(s)  # never for equal weights
    log_mean = torch.where(
        loses_digits,
        torch.logsumexp(log_mass, dim=0) - total.log(),
        torch.log1p(torch.where(loses_digits, 0.0, excess)),
    )
    loss = -m - log_mean / torch.where(independent, 1.0, alpha)
    mean = (relative * torch.where(has_weight, s, 0.0)).sum(dim=0) / total
    loss = torch.where(independent, -mean, loss)
    # a constant, because the gradient of an impossible example is zero; NaN if alpha or the weights are
    loss = torch.where(impossible, alpha + total.detach() + torch.inf, loss)
    responsibilities = torch.softmax(log_mass.detach(), dim=0)
    ess = 1.0 / responsibilities.square().sum(dim=0)
    dtype = at_least_fp32(logp.dtype)
    return loss.to(dtype), responsibilities.to(dtype), ess.to(dtype)


def relative_weights(weights: Tensor) -> Tensor:
    """weights [K] divided by the largest, in fp64; NaN unless they are a distribution: none below 0, sum 1."""
    weights = weights.double()
    proper = (weights >= 0.0).all() & ((weights.sum() - 1.0).abs() <= SUM_TOLERANCE)
    return weights / weights.amax().where(proper, torch.nan)


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
