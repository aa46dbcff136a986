"""What K particles answer to N questions, how unsure they are, and how much they disagree.

The total uncertainty is the entropy of the mixture. It is the sum of two parts. The aleatoric part says how unsure each
particle is by itself. The epistemic part is the mutual information between the answer and the particle (Houlsby et al.
2011; Depeweg et al. 2018, *Decomposition of Uncertainty in Bayesian Deep Learning*).

Layout: K particles, N questions, C choices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot


@dataclass(frozen=True)
class Predictive:
    """Predictions of K particles and of their mixture, with uncertainties in nats. All floats are fp64.

    Attributes:
        particles: [K, N, C] log-probabilities, log p_k.
        mixture: [N, C] log-probabilities, log mean_k p_k.
        answers: [K, N] the most probable choice of each particle.
        answer: [N] the most probable choice of the mixture.
        total: [N] H(mixture), in [0, log C].
        aleatoric: [N] mean_k H(p_k).
        epistemic: [N] mean_k KL(p_k || mixture) = total - aleatoric, never negative.
        variation_ratio: [N] the fraction of particles that do not give the most frequent answer (Gal 2016,
            *Uncertainty in Deep Learning*, 3.3.1).
    """

    particles: Tensor
    mixture: Tensor
    answers: Tensor
    answer: Tensor
    total: Tensor
    aleatoric: Tensor
    epistemic: Tensor
    variation_ratio: Tensor


def predictive(logp: Tensor) -> Predictive:
    """Predictions and uncertainties from log-likelihoods of the choices.

    Args:
        logp: [K, N, C] nats, the log-likelihood of each choice under each particle. A constant may be added for each
            particle and question. -inf: the choice is impossible.

    Raises:
        ValueError: the shape is wrong, an entry is NaN or +inf, or every choice is impossible for some particle.
    """
    if logp.ndim != 3 or logp.shape[0] == 0 or logp.shape[2] == 0:
        raise ValueError(f"logp: expected [K particles, N questions, C choices]; got shape {list(logp.shape)}")
    largest = logp.amax(dim=-1)  # NaN if any entry is
    if not largest.isfinite().all():
        particle, question = (~largest.isfinite()).nonzero()[0].tolist()
        raise ValueError(
            f"logp: expected numbers below +inf, at least one above -inf; got {logp[particle, question].tolist()} "
            f"from particle {particle} for question {question}; leave out that particle or that question"
        )
    num_particles, _, num_choices = logp.shape
    particles = logp.double().log_softmax(dim=-1)
    mixture = particles.logsumexp(dim=0) - math.log(num_particles)
    answers = particles.argmax(dim=-1)
    most_votes = one_hot(answers, num_choices).sum(dim=0).amax(dim=-1)
    return Predictive(
        particles=particles,
        mixture=mixture,
        answers=answers,
        answer=mixture.argmax(dim=-1),
        # the clamps remove rounding errors: an entropy cannot exceed log C, and a divergence cannot be below 0
        total=_expectation(mixture, -mixture).clamp(max=math.log(num_choices)),
        aleatoric=_expectation(particles, -particles).mean(dim=0),
        epistemic=_expectation(particles, particles - mixture).mean(dim=0).clamp(min=0.0),
        variation_ratio=(num_particles - most_votes).double() / num_particles,
    )


def _expectation(logp: Tensor, values: Tensor) -> Tensor:
    """sum_c p_c values_c. An impossible choice adds 0, even if its value is infinite or NaN."""
    p = logp.exp()
    return torch.where(p > 0, p * values, 0.0).sum(dim=-1)
