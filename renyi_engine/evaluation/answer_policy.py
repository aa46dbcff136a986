"""Whether to answer a question, to clarify it, or to abstain; with a promise about the answers that are wrong.

Layout: N questions, C choices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from renyi_engine.evaluation.uncertainty import Predictive

Decision = Literal["answer", "clarify", "abstain"]
NUM_CANDIDATES = 20
"""Thresholds that `calibrate` tries: one every 5 % of coverage."""


@dataclass(frozen=True)
class Policy:
    """When to answer, and what to do otherwise.

    Attributes:
        answer_below: nats; a question is answered if its total uncertainty is at most this.
        clarify_share: any other question is to be clarified if the epistemic part is at least this fraction of the
            total uncertainty.
    """

    answer_below: float
    clarify_share: float = 0.5

    def __post_init__(self) -> None:
        if not self.answer_below >= 0.0:
            raise ValueError(f"answer_below: expected a number of nats, at least 0; got {self.answer_below}")
        if not 0.0 <= self.clarify_share <= 1.0:
            raise ValueError(f"clarify_share: expected a number from 0 to 1; got {self.clarify_share}")


def decide(uncertainty: Predictive, policy: Policy) -> list[Decision]:
    """What to do with each of the N questions.

    answer: the mixture is sure enough. clarify: it is not sure, mostly because the particles are sure of different
    answers: the question is contested. abstain: it is not sure, mostly because each particle is unsure by itself.
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
    """The policy that answers as many questions as it can while at most `target_risk` of its answers are wrong.

    Guarantee: if the labelled questions are independent draws from the distribution of later questions, then with
    probability `confidence` over these draws the policy's selective risk P(wrong | answered) is at most `target_risk`,
    or no policy is returned. Ties do not weaken the guarantee.

    As in selection with guaranteed risk (Geifman & El-Yaniv 2017, *Selective Classification for Deep Neural Networks*,
    algorithm 1), a binomial upper bound of its risk decides on each threshold that is tried, and the thresholds divide
    the chance of a mistake among them. In theirs, the labels steer the search for a threshold. Here the thresholds are
    fixed beforehand, one every 5 % of coverage, so that all bounds hold at once, whichever threshold is taken.

    Args:
        correct: [N] bool, whether `uncertainty.answer` is right.
        target_risk: the largest fraction of wrong answers among all answers, in (0, 1).
        confidence: in (0, 1).
        clarify_share: goes into the policy unchanged.

    Raises:
        ValueError: an argument is out of range, or no threshold reaches the target. The message says which risk can be
            reached.
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

    # The uncertainties below a drawn one are a fair sample of all below it. The drawn one and its ties are not, so the
    # threshold lies just under it. The last threshold, log C, answers everything.
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
            f"target_risk: {num_questions} questions cannot promise {target_risk} with confidence {confidence}; the "
            f"lowest risk that they can promise is {min(bounds):.4f}; raise target_risk or label more questions"
        )
    return Policy(max(reaching), clarify_share)


def risk_bound(num_wrong: int, num_answered: int, confidence: float) -> float:
    """An upper bound of the error rate that holds with probability `confidence` (Clopper & Pearson 1934, one-sided).

    It is the rate at which `num_wrong` errors or fewer among `num_answered` questions have probability 1 -
    `confidence`, and 1 if all answers are wrong or there is none.
    """
    from scipy.special import betaincinv  # slow to import

    # at a rate p, num_wrong errors or fewer have probability 1 - I_p(num_wrong + 1, num_answered - num_wrong)
    return 1.0 if num_wrong == num_answered else float(betaincinv(num_wrong + 1, num_answered - num_wrong, confidence))
