"""What K particles say about N questions: how sure they are, how much they disagree, and whether to answer.

Total uncertainty is the entropy of the mixture. It splits into an aleatoric part, how unsure the particles are by
themselves, and an epistemic part, the mutual information between the answer and the particle (Houlsby et al. 2011;
Depeweg et al. 2018, *Decomposition of Uncertainty in Bayesian Deep Learning*).

Layout: K particles, N questions, C choices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import one_hot

Decision = Literal["answer", "clarify", "abstain"]

# thresholds that `calibrate` tries: one every 5 % of coverage
NUM_CANDIDATES = 20


@dataclass(frozen=True)
class Predictive:
    """Predictions of K particles and of their mixture; uncertainties in nats, all floats fp64.

    Attributes:
        particles: [K, N, C] log-probabilities, log p_k.
        mixture: [N, C] log-probabilities, log mean_k p_k.
        answers: [K, N] most probable choice of each particle.
        answer: [N] most probable choice of the mixture.
        total: [N] H(mixture), in [0, log C].
        aleatoric: [N] mean_k H(p_k).
        epistemic: [N] mean_k KL(p_k || mixture) = total - aleatoric, never negative.
        variation_ratio: [N] share of particles that do not vote for the most frequent answer (Gal 2016, *Uncertainty in
            Deep Learning*, 3.3.1).
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
        logp: [K, N, C] nats, log-likelihood of each choice under each particle, up to a constant for each particle and
            question; -inf for a choice that is impossible.

    Raises:
        ValueError: the shape is wrong, an entry is NaN or +inf, or a particle finds every choice impossible.
    """
    if logp.ndim != 3 or logp.shape[0] == 0 or logp.shape[2] == 0:
        raise ValueError(f"logp: expected [K particles, N questions, C choices]; got shape {list(logp.shape)}")
    largest = logp.amax(dim=-1)  # NaN if any entry is
    if not largest.isfinite().all():
        particle, question = (~largest.isfinite()).nonzero()[0].tolist()
        raise ValueError(
            f"logp: expected numbers below +inf, one of them above -inf; got {logp[particle, question].tolist()} "
            f"from particle {particle} for question {question}; leave that particle or that question out"
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
        # the clamps take off rounding: an entropy beyond that of the uniform, a divergence below 0
        total=_expectation(mixture, -mixture).clamp(max=math.log(num_choices)),
        aleatoric=_expectation(particles, -particles).mean(dim=0),
        epistemic=_expectation(particles, particles - mixture).mean(dim=0).clamp(min=0.0),
        variation_ratio=(num_particles - most_votes).double() / num_particles,
    )


def _expectation(logp: Tensor, values: Tensor) -> Tensor:
    """sum_c p_c values_c; what is impossible adds 0, even where its value is infinite or NaN."""
    p = logp.exp()
    return torch.where(p > 0, p * values, 0.0).sum(dim=-1)


@dataclass(frozen=True)
class Policy:
    """When to answer, and what to do instead.

    Attributes:
        answer_below: nats; a question is answered where its total uncertainty is at most this.
        clarify_share: of the others, those are worth clarifying whose epistemic share of the total is at least this.
    """

    answer_below: float
    clarify_share: float = 0.5

    def __post_init__(self) -> None:
        if not self.answer_below >= 0.0:
            raise ValueError(f"answer_below: expected nats from 0; got {self.answer_below}")
        if not 0.0 <= self.clarify_share <= 1.0:
            raise ValueError(f"clarify_share: expected a share from 0 to 1; got {self.clarify_share}")


def decide(uncertainty: Predictive, policy: Policy) -> list[Decision]:
    """What to do with each of the N questions.

    answer: the mixture is sure enough. clarify: it is not, mostly because particles are sure of different answers, so
    that the question is contested. abstain: it is not, mostly because the particles are unsure themselves.
    """
    sure = uncertainty.total <= policy.answer_below
    contested = uncertainty.epistemic >= policy.clarify_share * uncertainty.total
    return [
        "answer" if is_sure else "clarify" if is_contested else "abstain"
        for is_sure, is_contested in zip(sure.tolist(), contested.tolist(), strict=True)
    ]


def calibrate(
    uncertainty: Predictive,
    correct: Tensor,
    target_risk: float,
    *,
    confidence: float = 0.95,
    clarify_share: float = 0.5,
) -> Policy:
    """The policy that answers most while at most `target_risk` of what it answers is wrong.

    Guarantee: if the labelled questions are drawn independently from where later ones come from, then with probability
    `confidence` over that draw the policy's selective risk P(wrong | answered) is at most `target_risk`, or nothing is
    returned. Ties do not weaken it.

    As in selection with guaranteed risk (Geifman & El-Yaniv 2017, *Selective Classification for Deep Neural Networks*,
    algorithm 1), each threshold tried is judged by a binomial upper bound of its risk, and the chance of a mistake is
    shared among them. Here they are fixed beforehand, at every 5 % of coverage, in place of a search that the labels
    steer: all the bounds then hold at once, whichever threshold is taken.

    Args:
        correct: [N] bool, whether `uncertainty.answer` is right.
        target_risk: share of wrong answers among those given, in (0, 1).
        confidence: in (0, 1).
        clarify_share: goes into the policy as it is.

    Raises:
        ValueError: an argument is out of range, or no threshold reaches the target; the message says what can.
    """
    num_questions, num_choices = uncertainty.mixture.shape
    if correct.shape != (num_questions,) or correct.dtype != torch.bool or num_questions == 0:
        raise ValueError(
            f"correct: expected bool [{num_questions}], one for each question, at least one; "
            f"got {correct.dtype} {list(correct.shape)}"
        )
    for name, value in [("target_risk", target_risk), ("confidence", confidence)]:
        if not 0.0 < value < 1.0:
            raise ValueError(f"{name}: expected a number between 0 and 1; got {value}")

    # given an uncertainty that was drawn, those drawn below it are a fair sample of all below it; itself and its ties
    # are not, so a threshold lies just under it. The last one, the entropy of the uniform, answers everything.
    ranked = uncertainty.total.sort().values.tolist()
    drawn = [ranked[num_questions * step // NUM_CANDIDATES] for step in range(1, NUM_CANDIDATES)]
    thresholds = [*(math.nextafter(total, -math.inf) for total in drawn), math.log(num_choices)]
    each_confidence = 1.0 - (1.0 - confidence) / NUM_CANDIDATES
    bounds = []
    for threshold in thresholds:
        answered = uncertainty.total <= threshold
        num_wrong, num_answered = int((answered & ~correct).sum()), int(answered.sum())
        bounds.append(risk_bound(num_wrong, num_answered, each_confidence))
    reaching = [threshold for threshold, bound in zip(thresholds, bounds, strict=True) if bound <= target_risk]
    if not reaching:
        raise ValueError(
            f"target_risk: {target_risk} cannot be promised with confidence {confidence} from {num_questions} "
            f"questions; the lowest risk that can is {min(bounds):.4f}; raise the target or label more questions"
        )
    return Policy(max(reaching), clarify_share)


def risk_bound(num_wrong: int, num_answered: int, confidence: float) -> float:
    """Upper bound of an error rate that holds with probability `confidence` (Clopper & Pearson 1934, one-sided).

    The rate at which `num_wrong` errors or fewer among `num_answered` questions have probability 1 - `confidence`;
    1 where all are wrong, or nothing is answered.
    """
    if num_wrong == num_answered:
        return 1.0
    wrong = torch.arange(num_wrong + 1, dtype=torch.float64)
    right = num_answered - wrong
    log_ways = math.lgamma(num_answered + 1) - torch.lgamma(wrong + 1) - torch.lgamma(right + 1)
    low, high = 0.0, 1.0
    while low < (rate := (low + high) / 2) < high:  # until no number lies between them
        log_tail = (log_ways + wrong * math.log(rate) + right * math.log1p(-rate)).logsumexp(dim=0)
        if log_tail > math.log1p(-confidence):
            low = rate
        else:
            high = rate
    return high
