"""How good probabilities are: right, likely, calibrated, and able to tell what is wrong.

Layout: N questions, C choices, P points of a curve.

Most functions take `probabilities` [N, C] and `labels` [N], the index of the right choice. The most probable choice is
the answer, and its probability is the confidence. The other functions take `score` [N], an uncertainty (larger is less
certain), and `wrong` [N] bool. All raise a ValueError that says which argument is wrong.
"""

from __future__ import annotations

import torch
from torch import Tensor

SUM_TOLERANCE = 1e-3
"""How far from 1 rounding may put the sum of a question's probabilities."""


def accuracy(probabilities: Tensor, labels: Tensor) -> float:
    """The fraction of questions whose answer is right."""
    probabilities = _checked(probabilities, labels)
    return (probabilities.argmax(dim=-1) == labels).double().mean().item()


def nll(logp: Tensor, labels: Tensor) -> float:
    """The mean negative log-likelihood of the right choice, nats; +inf if some right choice has probability 0.

    Args:
        logp: [N, C] log-probabilities: a probability that underflows has lost its logarithm.
    """
    _checked(logp.exp(), labels, name="exp(logp)")
    return -logp.double().gather(1, labels[:, None]).mean().item()


def brier(probabilities: Tensor, labels: Tensor) -> float:
    """mean_i sum_c (p_ic - [c = y_i])^2, from 0 to 2: the form for many categories of Brier (1950).

    For two outcomes, some authors square the probability of one outcome only. Their number is half of this one.
    """
    probabilities = _checked(probabilities, labels)
    truth = torch.nn.functional.one_hot(labels, probabilities.shape[1])
    return (probabilities - truth).square().sum(dim=-1).mean().item()


def ece(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """The expected calibration error of the answers (Guo et al. 2017), as torchmetrics computes it in fp32.

    It is the sum, over the bins of `reliability`, of the fraction of questions times |accuracy - confidence|.
    """
    from torchmetrics.functional.classification import multiclass_calibration_error  # seconds to import

    probabilities = _checked(probabilities, labels)
    return multiclass_calibration_error(probabilities, labels, probabilities.shape[1], n_bins=bins).item()


def reliability(probabilities: Tensor, labels: Tensor, bins: int = 15) -> tuple[Tensor, Tensor, Tensor]:
    """(confidence, accuracy, fraction of questions) of each bin that is not empty, fp64 [P], by rising confidence.

    The bins are those of torchmetrics: [i/bins, (i+1)/bins) of the confidence in fp32, and one more for exactly 1.
    """
    probabilities = _checked(probabilities, labels)
    confidence, answer = probabilities.max(dim=-1)
    confidence = confidence.float()
    edges = torch.linspace(0, 1, bins + 1, dtype=confidence.dtype, device=confidence.device)
    bin_numbers = torch.bucketize(confidence, edges, right=True)
    confidences, num_questions = _sum_groups(bin_numbers, confidence)
    num_right, _ = _sum_groups(bin_numbers, answer == labels)
    return confidences / num_questions, num_right / num_questions, num_questions / len(labels)


def auroc(score: Tensor, wrong: Tensor) -> float | None:
    """The probability that a wrong answer has a higher score than a right one; a tie counts half. By torchmetrics.

    None if it is not defined: every answer is wrong, or none is.
    """
    from torchmetrics.functional.classification import binary_auroc  # seconds to import

    _check_score(score, wrong)
    if wrong.all() or not wrong.any():
        return None
    # torchmetrics puts scores outside [0, 1] through a sigmoid, which makes large ones equal; it leaves ranks alone
    _, rank = torch.unique(score, return_inverse=True)
    return binary_auroc(rank.double() / len(score), wrong.long()).item()


def risk_coverage(score: Tensor, wrong: Tensor) -> tuple[Tensor, Tensor]:
    """(coverage, risk): the fraction of questions answered, and the fraction of wrong answers among them; fp64 [P].

    There is one point for each score that occurs, by rising score: it answers all questions up to that score. Questions
    with the same score come in together, as no threshold can tell them apart (El-Yaniv & Wiener 2010).
    """
    _check_score(score, wrong)
    num_wrong, num_questions = _sum_groups(score, wrong)
    num_answered = num_questions.cumsum(dim=0)
    return num_answered / len(score), num_wrong.cumsum(dim=0) / num_answered


def aurc(score: Tensor, wrong: Tensor) -> float:
    """The area under the risk-coverage curve (Geifman, Uziel & El-Yaniv 2019).

    It is the mean, over questions, of the risk when that question has just been let in. If all scores are equal, it is
    the error rate.
    """
    coverage, risk = risk_coverage(score, wrong)
    return (risk * coverage.diff(prepend=coverage.new_zeros(1))).sum().item()


def _sum_groups(groups: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """(sum of values, number of values), fp64, of each group that occurs, by rising group."""
    found, group, counts = torch.unique(groups, return_inverse=True, return_counts=True)
    sums = torch.zeros(len(found), dtype=torch.float64, device=values.device)
    return sums.index_add(0, group, values.double()), counts.double()


def _checked(probabilities: Tensor, labels: Tensor, name: str = "probabilities") -> Tensor:
    """`probabilities` in fp64 and at most 1: torchmetrics would take larger ones for logits."""
    if probabilities.ndim != 2 or probabilities.numel() == 0:
        raise ValueError(f"{name}: expected [N questions, C choices]; got shape {list(probabilities.shape)}")
    num_questions, num_choices = probabilities.shape
    if labels.shape != (num_questions,) or labels.dtype != torch.int64:
        raise ValueError(f"labels: expected int64 [{num_questions}]; got {labels.dtype} {list(labels.shape)}")
    probabilities = probabilities.double()
    # in this form, NaN does not pass
    fits = (probabilities >= 0).all(dim=1) & ((probabilities.sum(dim=1) - 1).abs() <= SUM_TOLERANCE)
    if not fits.all():
        question = int((~fits).nonzero()[0])
        raise ValueError(
            f"{name}: expected numbers that sum to 1 for each question; question {question} has "
            f"{probabilities[question].tolist()}; normalise with softmax or log_softmax"
        )
    stray = (labels < 0) | (labels >= num_choices)
    if stray.any():
        question = int(stray.nonzero()[0])
        raise ValueError(f"labels: expected 0 to {num_choices - 1}; question {question} has {int(labels[question])}")
    return probabilities.clamp(max=1.0)


def _check_score(score: Tensor, wrong: Tensor) -> None:
    num_nan = int(score.isnan().sum())
    if score.ndim != 1 or len(score) == 0 or num_nan:
        raise ValueError(f"score: expected numbers [N questions]; got shape {list(score.shape)}, {num_nan} of them NaN")
    if wrong.shape != score.shape or wrong.dtype != torch.bool:
        raise ValueError(f"wrong: expected bool [{len(score)}]; got {wrong.dtype} {list(wrong.shape)}")
