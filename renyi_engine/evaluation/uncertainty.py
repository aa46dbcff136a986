"""What K particles answer to N questions, how unsure they are, and how much they disagree.

The total uncertainty is the entropy of the mixture. It is the sum of two parts. The aleatoric part says how unsure each
particle is by itself. The epistemic part is the mutual information between the answer and the particle (Houlsby et al.
2011; Depeweg et al. 2018, *Decomposition of Uncertainty in Bayesian Deep Learning*). Particle k is drawn with the
probability w_k, its weight in the mixture.

Layout: K particles, N questions, C choices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from renyi_kernels import renyi_reduce
from renyi_kernels.reference import relative_weights


@dataclass(frozen=True)
class Predictive:
    """Predictions of K particles and of their mixture, with uncertainties in nats. All floats are fp64.

    Attributes:
        particles: [K, N, C] log-probabilities, log p_k.
        mixture: [N, C] log-probabilities, log sum_k w_k p_k.
        answers: [K, N] the most probable choice of each particle.
        answer: [N] the most probable choice of the mixture.
        total: [N] H(mixture), in [0, log C].
        aleatoric: [N] sum_k w_k H(p_k).
        epistemic: [N] sum_k w_k KL(p_k || mixture) = total - aleatoric, never negative.
        variation_ratio: [N] 1 - max_c sum_k w_k [particle k answers c]: the chance that a particle does not give the
            most frequent answer (Gal 2016, *Uncertainty in Deep Learning*, 3.3.1).
    """

    particles: Tensor
    mixture: Tensor
    answers: Tensor
    answer: Tensor
    total: Tensor
    aleatoric: Tensor
    epistemic: Tensor
    variation_ratio: Tensor


def predictive(logp: Tensor, weights: Tensor | None = None) -> Predictive:
    """Predictions and uncertainties from log-likelihoods of the choices.

    A particle of weight 0 counts in no number of the mixture, as if it were not there.

    Args:
        logp: [K, N, C] nats, the log-likelihood of each choice under each particle. A constant may be added for each
            particle and question. -inf: the choice is impossible.
        weights: [K], floating: the w_k, as `renyi_reduce` takes them. None: 1/K each.

    Raises:
        ValueError: the shape is wrong, an entry is NaN or +inf, or every choice is impossible for some particle; the
            weights do not fit, are below 0, or do not sum to 1.
        TypeError: the weights are not floating point.
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
    _, num_questions, num_choices = logp.shape
    particles = logp.double().log_softmax(dim=-1)
    # alpha = 1: the loss of a choice is its nll under the mixture (Lemma 1 of the paper)
    nll = renyi_reduce(particles.flatten(1), 1.0, weights=weights, backend="torch").loss
    mixture = -nll.unflatten(0, (num_questions, num_choices))
    answers = particles.argmax(dim=-1)
    # divided by the largest, equal weights are 1, so the votes are whole numbers, and no rounding decides a tie
    relative = particles.new_ones(len(particles)) if weights is None else relative_weights(weights).to(logp.device)
    votes = (relative[:, None, None] * one_hot(answers, num_choices)).sum(dim=0)
    return Predictive(
        particles=particles,
        mixture=mixture,
        answers=answers,
        answer=mixture.argmax(dim=-1),
        # the clamps remove rounding errors: an entropy cannot exceed log C, and a divergence cannot be below 0
        total=_expectation(mixture, -mixture).clamp(max=math.log(num_choices)),
        aleatoric=_mean(_expectation(particles, -particles), relative),
        epistemic=_mean(_expectation(particles, particles - mixture), relative).clamp(min=0.0),
        variation_ratio=((relative.sum() - votes.amax(dim=-1)) / relative.sum()).clamp(min=0.0),
    )


def _mean(values: Tensor, relative: Tensor) -> Tensor:
    """The mean of values [K, N] over the particles. Those of weight 0 do not count, even if a value is infinite."""
    counts = relative[:, None] > 0
    return torch.where(counts, relative[:, None] * values, 0.0).sum(dim=0) / relative.sum()


def _expectation(logp: Tensor, values: Tensor) -> Tensor:
    """sum_c p_c values_c. An impossible choice adds 0, even if its value is infinite or NaN."""
    p = logp.exp()
    return torch.where(p > 0, p * values, 0.0).sum(dim=-1)
