"""What an ensemble says of an example: do its particles agree about it, and does any of them explain it?

Let p[k,t] be the probability that particle k gives to token t of an example, s[k] = sum_t log p[k,t], and T the number
of its tokens:

    disagreement    max_t ( max_k p[k,t] - min_k p[k,t] ), from 0 (all particles say the same) to 1
    gain            ( max_k s[k] - s[base] ) / T, nats a token

    out of support           the gain is below 0, or below nearly all gains of a calibration set: see `support_limit`
    contested or poisoned    it is not out of support, and the disagreement is at least `min_disagreement`

A particle of weight 0 does not count, as if it were not there. Else weights change responsibilities and the mixture's
nll, but no flag. The flag of an example does not depend on the other examples. Particles that equal the base flag no
example.

The disagreement is measured at one token, because small differences add up over a long answer that nobody disputes. It
is measured in probabilities, because the answers of both camps then count the same: 0.99 against 0.66 is the same
dispute as 0.01 against 0.34. It is at most the distance in total variation between two particles' predictions of that
token.

Layout: K particles, N examples, B sequences, T tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from renyi_kernels import renyi_reduce

CONTESTED, OUT_OF_SUPPORT, PLAIN = "contested or poisoned", "out of support", ""
FLAGGED_BY = ("disagreement", "gain_over_base_nats_per_token")
NLLS = ("best_particle_nll_nats_per_token", "mixture_nll_nats_per_token", "base_nll_nats_per_token")


@dataclass(frozen=True)
class Diagnosis:
    """One example: a line of examples.csv."""

    row: int
    flag: str
    disagreement: float
    gain_over_base_nats_per_token: float
    ess_particles: float
    responsibility_entropy_nats: float
    best_particle: int
    best_particle_nll_nats_per_token: float
    mixture_nll_nats_per_token: float
    base_nll_nats_per_token: float
    num_tokens: int
    text: str


def token_disagreement(logp: Tensor) -> Tensor:
    """max_t ( max_k p[k,t] - min_k p[k,t] ), a difference of probabilities, [K, B, T] -> [B].

    logp: of each token that has a label, nats; 0.0 at the others, which therefore add no disagreement.
    """
    p = logp.exp()
    return (p.amax(dim=0) - p.amin(dim=0)).amax(dim=-1)


def gain_over_base(logp: Tensor, base_logp: Tensor, num_tokens: Tensor, weights: Tensor) -> Tensor:
    """( max_k s[k,i] - s[base,i] ) / T[i], nats a token, [N]: how much the best particle learnt about each example."""
    return (logp[weights > 0].amax(dim=0) - base_logp) / num_tokens


def support_limit(gains: Tensor, share: float) -> float:
    """The gain below which an example is out of support, from the gains [N] of a calibration set.

    Guarantee: a new example from the distribution of the calibration set is called out of support with a probability of
    at most `share`, whatever that distribution is (split conformal prediction, Vovk et al. 2005). The limit is the gain
    of rank r = floor(share (N + 1)), smallest first. A gain below it has rank r or less among all N + 1, which has a
    probability of at most r / (N + 1).

    Raises:
        ValueError: the calibration set has too few examples for that share.
    """
    check_calibration(len(gains), share)
    return gains.sort().values[math.floor(share * (len(gains) + 1)) - 1].item()


def check_calibration(num_examples: int, share: float) -> None:
    """Raises ValueError if the calibration set has too few examples for `share`."""
    if math.floor(share * (num_examples + 1)) < 1:
        raise ValueError(
            f"calibration_dataset_name: a calibration_share of {share:g} needs at least {math.ceil(1 / share) - 1} "
            f"examples; got {num_examples}; add rows, or pass a larger --calibration_share"
        )


def diagnose(
    logp: Tensor,
    base_logp: Tensor,
    disagreement: Tensor,
    num_tokens: Tensor,
    alpha: float,
    min_disagreement: float,
    min_gain: float,
    weights: Tensor,
) -> list[tuple[str, float, float, float, float, int, float, float, float, int]]:
    """The fields of `Diagnosis` from flag to num_tokens, for each example.

    Args:
        logp: [K, N] nats, summed over tokens. base_logp, disagreement, num_tokens: [N].
        alpha: the alpha of the responsibilities, which give ESS and entropy. No flag depends on it.
        min_gain: nats a token; an example that gains less is out of support.
        weights: [K], of the particles in the mixture.
    """
    out = renyi_reduce(logp, alpha, weights=weights)
    entropy = torch.special.entr(out.responsibilities).sum(dim=0)
    best, best_particle = logp.where(weights[:, None] > 0, -torch.inf).max(dim=0)
    gain = gain_over_base(logp, base_logp, num_tokens, weights)
    unsupported = gain < min_gain
    contested = (disagreement >= min_disagreement) & ~unsupported
    flags = [CONTESTED if c else OUT_OF_SUPPORT if u else PLAIN for c, u in zip(contested, unsupported, strict=True)]
    nlls = (-best / num_tokens, renyi_reduce(logp, 1.0, weights=weights).loss / num_tokens, -base_logp / num_tokens)
    columns = (disagreement, gain, out.ess, entropy, best_particle, *nlls, num_tokens)
    return list(zip(flags, *(column.tolist() for column in columns), strict=True))
