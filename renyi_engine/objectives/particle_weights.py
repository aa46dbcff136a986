"""The weights of the particles in the mixture, fitted to examples.

Setting the derivative in w of the data term of (19) with weights,

    (1/N) sum_i -(1/alpha) log sum_k w_k exp(alpha s_ki),      w on the simplex,

to zero gives ``w_k = mean_i r_ki`` for every alpha > 0: a particle's weight is its mean responsibility. The step of
EM, ``w <- mean_i r_ki``, never raises this loss, which is convex in w. At alpha = 0 the responsibilities are the
weights, so nothing can be learned.

Layout: K particles, N examples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from renyi_kernels.renyi_reduce import check_alpha

AVERAGING_RATE = 1 / 50
"""How far training moves the weights in one step towards the mean responsibilities of its examples. So they are an
average over about the last 50 steps: with 8 examples a step, chance then moves a weight of 1/4 by about 0.015."""

_TOLERANCE = 1e-9
"""EM stops when no weights have a loss that is lower by more than this, in nats an example, or by more than
this over alpha if alpha is above 1."""
_MAX_ITERATIONS = 20_000
_LONGER = 1.5
"""By what factor a step is longer than the one before it, as long as the loss falls (adaptive overrelaxed EM, of
Salakhutdinov & Roweis 2003). At a small alpha, or where particles are nearly alike, EM's own steps are too short."""
_LEAST_WEIGHT = 1e-30
_NEGLIGIBLE = 1e-6
"""EM comes near to a weight of 0, but never gets there. A smaller one than this becomes 0 if that lowers the loss."""


def fit_particle_weights(logp: Tensor, alpha: float = 1.0, *, rows: Sequence[int] | None = None) -> Tensor:
    """The weights ``[K]`` with the lowest mean loss at `alpha` on these examples, by EM; fp64, on the CPU.

    >>> ensemble.particle_weights = fit_particle_weights(evaluate(ensemble, task, held_out, batch_size=8).logp)

    Args:
        logp: log-likelihoods ``[K, N]`` in nats, best of examples that training did not see.
        alpha: above 0. At 1 the mixture's likelihood is maximised (Lemma 1).
        rows: the number of each example's row in its data set, for errors.

    Returns:
        Weights with the sum 1. Particles that are alike on all examples get equal weights. A particle without which
        the loss is lower gets 0.

    Raises:
        ValueError: alpha is not above 0; there is no example; a log-likelihood is NaN or +inf; or no particle gives an
            example any mass.
    """
    alpha = check_alpha(alpha)
    if alpha == 0.0:
        raise ValueError("alpha: at 0 every particle's responsibilities are its weight; expected a number above 0")
    if logp.dim() != 2 or 0 in logp.shape:
        raise ValueError(f"logp: expected [K, N] of at least one example; got {list(logp.shape)}")
    s = logp.detach().double().cpu()
    _require_mass(s, rows)
    # relative to the particle that explains an example best, so nothing overflows, and no example loses all its mass;
    # less 1, so that no digit is lost at a small alpha
    excess = torch.expm1(alpha * (s - s.amax(dim=0)))
    weights = torch.full((len(s),), 1 / len(s), dtype=torch.float64)
    gains, length = _gains(weights, excess), 1.0
    for _ in range(_MAX_ITERATIONS):
        # the loss is convex in w, so no other weights have a lower one by more than this, in units of 1/alpha
        if gains.amax() <= _TOLERANCE * min(alpha, 1.0):
            break
        stepped = weights * torch.exp(length * (torch.log1p(gains) - torch.log1p(gains.amax())))
        # only a particle that gives no example any mass gets the weight 0, from which none comes back
        stepped = torch.where(gains > -1.0, stepped.clamp(min=_LEAST_WEIGHT), 0.0)
        stepped = stepped / stepped.sum()
        gains_there = _gains(stepped, excess)
        # does the loss still fall where the step ends? Then it fell all the way. EM's own step never raises it
        if length == 1.0 or gains_there @ (stepped - weights) >= 0.0:
            weights, gains, length = stepped, gains_there, length * _LONGER
        else:
            length = 1.0
    without = torch.where((weights < _NEGLIGIBLE) & (gains < 0.0), 0.0, weights)
    without = without / without.sum()
    return without if _gains(without, excess) @ (without - weights) >= 0.0 else weights


def _gains(weights: Tensor, excess: Tensor) -> Tensor:
    """mean_i r_ki / w_k - 1, [K]: -alpha times the derivative in w of the mean loss, without its mean over w."""
    mean = weights @ excess
    return ((excess - mean) / (1.0 + mean)).mean(dim=1)


def averaged(weights: Tensor, responsibilities: Tensor, rate: float, floor: float) -> Tensor:
    """(1 - rate) w + rate mean_i r_ki, with every weight at least `floor`: one averaged step of EM, ``[K]``, fp64.

    Args:
        weights: ``[K]``, fp64. responsibilities: ``[K, N]``; each column sums to 1.
        rate: how far the weights move, from 0 to 1. floor: from 0 to below 1/K.
    """
    return at_least(torch.lerp(weights, responsibilities.double().mean(dim=1), rate), floor)


def at_least(weights: Tensor, floor: float) -> Tensor:
    """The distribution ``[K]`` that is nearest to `weights` among those with no weight below `floor`, below 1/K.

    It is nearest in KL(weights || result): weights that would be too small become `floor`, and one factor scales all
    others, so their proportions stay. It is also the step of EM if no weight may be smaller, so EM's loss still never
    rises. Nothing asks for a value.
    """
    ascending = weights.sort().values
    num_raised = torch.arange(len(weights), dtype=weights.dtype, device=weights.device)
    rest = ascending.flip(0).cumsum(0).flip(0)  # the sum of the weights that are scaled
    factors = (1.0 - num_raised * floor) / rest
    # raise as few as possible: the smallest weight that is scaled must not fall below the floor
    first = (factors * ascending >= floor).int().argmax().view(1)
    return (weights * factors.gather(0, first)).clamp(min=floor)


def _require_mass(logp: Tensor, rows: Sequence[int] | None) -> None:
    """ValueError, which names the row, unless every example has finite mass under some particle."""
    what, numbers = ("row", rows) if rows is not None else ("column", range(logp.shape[1]))
    wrong = logp.isnan() | (logp == math.inf)
    if wrong.any():
        k, i = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"logp: particle {k} gives {what} {numbers[i]} the log-likelihood {logp[k, i].item()}; expected finite "
            "numbers or -inf; leave that particle or that row out"
        )
    impossible = logp.isneginf().all(dim=0)
    if impossible.any():
        i = int(impossible.nonzero()[0])
        raise ValueError(
            f"logp: no particle gives {what} {numbers[i]} any mass (all log-likelihoods are -inf), so no weights "
            "explain it; leave it out"
        )
