"""Finite parameter spaces: the loss of any distribution over M parameters, its posterior, and when specialists win.

The functions need only a table of log-likelihoods. They compute in fp64.

Layout: M parameters, K specialists, N examples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from renyi_kernels import RenyiOutput, reference, renyi_reduce
from renyi_kernels.renyi_reduce import check_alpha


@dataclass(frozen=True)
class Posterior:
    """A distribution over a finite parameter space, and the evidence that it minimises `objective`."""

    probabilities: Tensor
    """[M]: q."""
    residual: float
    """The total variation between q and the right side of (10) at q. It is 0 at the posterior."""
    gap_nats: float
    """lambda KL(q || right side of (10)). Up to rounding, objective(q) is above its minimum by at most this."""
    trace_nats: tuple[float, ...]
    """The objective at the prior and after every step that was taken. It never rises by more than rounding."""
    num_iterations: int
    """How many steps were tried, taken or not; 0 for the closed form at alpha = 0."""
    converged: bool
    """Whether residual and gap are both within the tolerance."""


def mixture_loss(logp: Tensor, q: Tensor, alpha: float) -> RenyiOutput:
    """loss_i = -(1/alpha) log sum_m q_m exp(alpha s_mi), eq. (6) for any distribution q; -sum_m q_m s_mi at alpha = 0.

    This is `renyi_reduce` with the weights q, but also differentiable in q.

    >>> mixture_loss(logp, q, alpha).loss == renyi_reduce(logp.double(), alpha, weights=q).loss

    Args:
        logp: [M, N] nats, s. -inf: the parameter gives the example probability 0.
        q: [M], a distribution over the parameters.
        alpha: finite, >= 0.

    Returns:
        RenyiOutput(loss [N] nats, responsibilities [M, N], ess [N], logp [M, N]), fp64. The responsibilities are
        q_m exp(alpha s_mi) / E_q[exp(alpha s_i)]. An example to which q gives probability 0 has loss +inf. The loss is
        differentiable in logp, and in q if all of q is above 0.

    Raises:
        ValueError: a shape is wrong, logp holds NaN or +inf, q is not a distribution, or alpha is out of range.
    """
    s = _table("logp", logp, "M")
    loss, responsibilities, ess = reference.renyi_reduce(s, check_alpha(alpha), _distribution("q", q, s))
    return RenyiOutput(loss, responsibilities, ess, s.detach())


def objective(logp: Tensor, q: Tensor, prior: Tensor, alpha: float, weight: float) -> Tensor:
    """sum_i loss_i(q) + lambda KL(q || prior), a scalar in nats: what the posterior minimises (Prop. 1).

    Args:
        logp, q, alpha: as in `mixture_loss`. prior: [M], a distribution. weight: lambda > 0.

    Raises:
        ValueError: as in `mixture_loss`; or prior is not a distribution, or weight is not above 0.
    """
    s = _table("logp", logp, "M")
    q, prior = _distribution("q", q, s), _distribution("prior", prior, s)
    loss = mixture_loss(s, q, alpha).loss
    # the logarithms are taken apart, so that a parameter with q = prior = 0 adds 0 and not NaN
    divergence = torch.special.xlogy(q, q) - torch.special.xlogy(q, prior)
    return loss.sum() + _weight(weight) * divergence.sum()


def reweighted(logp: Tensor, q: Tensor, prior: Tensor, alpha: float, weight: float) -> Tensor:
    """F(q) ∝ prior exp((1/(lambda alpha)) sum_i p_i^alpha / E_q[p_i^alpha]), the right side of (10), [M].

    It minimises the objective with the data term linearised at q, because the derivative of that term in q_m is
    -(1/alpha) sum_i p_mi^alpha / E_q[p_i^alpha]. At alpha = 0 it is the Gibbs posterior, whatever q is.

    Args:
        logp, q, alpha: as in `mixture_loss`. prior: [M], a distribution. weight: lambda > 0.

    Raises:
        ValueError: as in `objective`; or q gives an example probability 0, where (10) is not defined, or so little that
            it overflows.
    """
    s = _table("logp", logp, "M")
    q, prior = _distribution("q", q, s), _distribution("prior", prior, s)
    alpha, weight = check_alpha(alpha), _weight(weight)
    if alpha == 0.0:
        return _gibbs(s, prior.log(), weight).exp()
    loss, excess = _loss_and_excess(s, q, alpha)
    if loss.isinf().any():
        raise ValueError(f"q: expected a parameter with q > 0 that allows {_first(loss.isinf())}; widen its support")
    support = prior > 0
    excess = excess[support]
    if excess.isinf().any():
        raise ValueError(
            "q: a parameter with almost no mass explains some example so much better that their ratio overflows; give "
            "it more mass"
        )
    return torch.zeros_like(prior).masked_scatter(support, _image(excess, prior[support].log(), alpha, weight).exp())


def self_consistent_posterior(
    logp: Tensor,
    prior: Tensor,
    alpha: float,
    weight: float,
    *,
    tolerance: float = 1e-8,
    max_iterations: int = 500,
) -> Posterior:
    """The minimiser of `objective`: the q with q = F(q), eq. (10). At alpha = 0 the Gibbs posterior, in closed form.

    It is found by a damped fixed-point iteration in log space: log q <- log q + (C + tau)^-1 lambda (log F(q) - log q),
    then normalised. C is the curvature of the data term. Without C, this would be entropic mirror descent,
    log q <- (1 - eta) log q + eta log F(q) with eta = lambda / tau, which takes thousands of steps if N / lambda is
    large. With C and tau = lambda it is Newton's step. tau grows when a step would raise the objective, and shrinks
    when a step is taken.

    The gap is a bound because the data term D is convex in q (-log of something linear). With g its gradient at q,
    objective(q') >= D(q) + g.(q' - q) + lambda KL(q' || prior) for all q'. F(q) minimises the right side, and
    objective(q) minus that minimum is lambda KL(q || F(q)).

    Args:
        logp: [M, N] nats. -inf: the parameter gives the example probability 0.
        prior: [M], a distribution. A parameter of prior 0 keeps probability 0.
        alpha: finite, >= 0. weight: lambda > 0.
        tolerance: for the residual and, in nats, for the gap. Rounding alone is about 1e-16 N / (lambda alpha) in both.
        max_iterations: how many steps to try. If they do not suffice, the last q is returned, with converged False.

    Raises:
        ValueError: as in `objective`; or no q has a finite objective: every parameter with prior > 0 gives
            probability 0 to the same example, or, at alpha = 0, to some example.
    """
    table = _table("logp", logp, "M")
    prior = _distribution("prior", prior, table)
    alpha, weight = check_alpha(alpha), _weight(weight)
    support = prior > 0
    s, log_prior = table[support], prior[support].log()
    if (impossible := s.isneginf().all(dim=0)).any():
        raise ValueError(f"logp: expected a parameter of prior > 0 that allows {_first(impossible)}; every one is -inf")
    if alpha == 0.0:
        log_q = _gibbs(s, log_prior, weight)
        q = torch.zeros_like(prior).masked_scatter(support, log_q.exp())
        value = objective(table, q, prior, alpha, weight).item()
        return Posterior(q, residual=0.0, gap_nats=0.0, trace_nats=(value,), num_iterations=0, converged=True)

    at, damping, num_iterations = _Point.at(s, log_prior, log_prior, alpha, weight), weight, 0
    trace, identity = [at.objective], torch.eye(len(s), dtype=s.dtype, device=s.device)
    while not (converged := max(at.gap, at.residual) <= tolerance) and num_iterations < max_iterations:
        num_iterations += 1
        curvature = at.excess @ (at.excess * at.log_q.exp()[:, None]).T / alpha
        step = torch.linalg.solve(curvature + damping * identity, weight * (at.log_image - at.log_q))
        tried = _Point.at(s, log_prior, torch.log_softmax(at.log_q + step, dim=0), alpha, weight)
        # a step from which F(q) overflows is refused like one that raises the objective
        if tried.objective <= at.objective + at.rounding and tried.excess.isfinite().all():
            at, damping = tried, max(weight, damping / 16)
            trace.append(at.objective)
        else:
            damping *= 4
    return Posterior(
        probabilities=torch.zeros_like(prior).masked_scatter(support, at.log_q.exp()),
        residual=at.residual,
        gap_nats=at.gap,
        trace_nats=tuple(trace),
        num_iterations=num_iterations,
        converged=converged,
    )


def threshold(specialists: Tensor, generalist: Tensor) -> float:
    """The alpha above which K specialists, each with weight 1/K, have a lower total alpha-loss than one generalist.

    Example 1: for likelihoods 0.9 and 0.1 against 0.4 it is 0.5. The specialists' loss never rises with alpha. At 0 it
    is the mean of their nlls, and at infinity, for each example, the nll of the best of them.

    Args:
        specialists: [K, N] nats. generalist: [N] nats. -inf: the example has probability 0.

    Returns:
        0.0 if the specialists win at every alpha > 0, math.inf if they win at none.

    Raises:
        ValueError: a shape is wrong, or a log-likelihood is NaN or +inf.
    """
    from scipy.optimize import brentq

    s, rival = _table("specialists", specialists, "K"), _table("generalist", generalist[None], "1")[0]
    if len(rival) != s.shape[1]:
        raise ValueError(f"generalist: expected [N] = [{s.shape[1]}] beside specialists; got [{len(rival)}]")
    to_beat, lead = -rival.sum().item(), (s.amax(dim=0) - rival).sum().item()

    def excess_loss(alpha: float) -> float:
        return renyi_reduce(s, alpha).loss.sum().item() - to_beat

    if not lead > 0.0:  # they lose even at infinity; NaN: both give some example probability 0
        return math.inf
    if math.isinf(to_beat) or excess_loss(0.0) <= 0.0:
        # an infinite loss of the generalist is beaten by any finite one, and the specialists' is finite for alpha > 0
        return 0.0
    # the specialists' loss is above its limit at infinity by at most N log(K) / alpha
    high = 2.0 * s.shape[1] * math.log(len(s)) / lead
    low = high / 2.0
    while excess_loss(low) <= 0.0:
        low, high = low / 2.0, low
    return brentq(excess_loss, low, high, xtol=1e-300, rtol=1e-15)


class _Point(NamedTuple):
    """What a step from q needs, over the parameters with prior > 0."""

    log_q: Tensor  # [M]
    excess: Tensor  # [M, N]: p^alpha / E_q[p^alpha] - 1
    log_image: Tensor  # [M]: log F(q)
    objective: float
    rounding: float  # of the objective, nats
    gap: float
    residual: float

    @staticmethod
    def at(s: Tensor, log_prior: Tensor, log_q: Tensor, alpha: float, weight: float) -> _Point:
        q = log_q.exp()
        loss, excess = _loss_and_excess(s, q, alpha)
        log_image = _image(excess, log_prior, alpha, weight)
        image, divergence = log_image.exp(), weight * (q * (log_q - log_prior)).sum()
        return _Point(
            log_q,
            excess,
            log_image,
            objective=(loss.sum() + divergence).item(),
            rounding=4 * torch.finfo(s.dtype).eps * (loss.abs().sum() + divergence).item(),
            # q log(q / F) - q + F: the sum is the same, and no term is negative
            gap=weight * (q * (log_q - log_image) - q + image).clamp(min=0.0).sum().item(),
            residual=0.5 * (image - q).abs().sum().item(),
        )


def _loss_and_excess(s: Tensor, q: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """(loss [N], p^alpha / E_q[p^alpha] - 1 [M, N])"""
    loss = mixture_loss(s, q, alpha).loss
    # the mean of the excess under q is 0. (10) divides by lambda alpha what rounding makes of it, so that is taken off
    drift = torch.log1p(q @ torch.expm1(alpha * (s + loss))) / alpha
    loss = loss - drift.nan_to_num(0.0, 0.0, 0.0)
    return loss, torch.expm1(alpha * (s + loss))


def _image(excess: Tensor, log_prior: Tensor, alpha: float, weight: float) -> Tensor:
    """log F(q) of (10). The 1 that `excess` lacks would cost digits at a small alpha; normalising makes up for it."""
    return torch.log_softmax(log_prior + excess.sum(dim=1) / (weight * alpha), dim=0)


def _gibbs(s: Tensor, log_prior: Tensor, weight: float) -> Tensor:
    log_q = log_prior + s.sum(dim=1) / weight
    if log_q.isneginf().all():
        raise ValueError(
            "logp: at alpha = 0, some parameter of prior > 0 must allow all examples; none does; raise alpha"
        )
    return torch.log_softmax(log_q, dim=0)


def _table(name: str, logp: Tensor, rows: str) -> Tensor:
    if logp.dim() != 2 or 0 in logp.shape:
        raise ValueError(f"{name}: expected [{rows}, N], at least one of each; got shape {list(logp.shape)}")
    if (bad := logp.isnan() | (logp == torch.inf)).any():
        row, column = bad.nonzero()[0].tolist()
        raise ValueError(
            f"{name}: expected log-likelihoods, finite or -inf; got {logp[row, column]} at [{row}, {column}]"
        )
    return logp.double()


def _distribution(name: str, q: Tensor, s: Tensor) -> Tensor:
    if q.shape != s.shape[:1]:
        raise ValueError(f"{name}: expected [M] = [{len(s)}], one probability a parameter; got shape {list(q.shape)}")
    q = q.double()
    if not ((q >= 0).all() and abs(q.sum().item() - 1.0) < 1e-6):
        raise ValueError(
            f"{name}: expected probabilities >= 0 with sum 1; their sum is {q.sum().item():.6g}, "
            f"the least is {q.min().item():.6g}; divide by the sum"
        )
    return q / q.sum()  # in single precision the sum may be off by 1e-7


def _weight(weight: float) -> float:
    if not (math.isfinite(weight) and weight > 0.0):
        raise ValueError(f"weight: expected a finite lambda > 0, the weight of the KL term; got {weight}")
    return float(weight)


def _first(examples: Tensor) -> str:
    return f"example {int(examples.nonzero()[0])}"
