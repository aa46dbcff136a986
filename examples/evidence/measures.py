"""Numbers that several experiments compute.

Layout: N questions.
"""

from __future__ import annotations

import numpy as np
from scipy.stats import rankdata


def auroc(score: np.ndarray, positive: np.ndarray) -> float:
    """The chance that a positive question has a higher score than another one; a tie counts half (Mann-Whitney).

    NaN if all questions are of one kind.
    """
    num_positive, num_others = int(positive.sum()), int((~positive).sum())
    if not num_positive * num_others:
        return float("nan")
    rank_sum = rankdata(score)[positive].sum()
    return float((rank_sum - num_positive * (num_positive + 1) / 2) / (num_positive * num_others))


def variance(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The variance of values [K, ...] over particles that are drawn by their weights [K]."""
    return weights @ np.square(values - weights @ values)


def information(together: np.ndarray) -> float:
    """The mutual information, in nats, of two things that occur together so often, [A, B]."""
    joint = together / together.sum()
    independent = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
    known = joint > 0
    return float((joint[known] * np.log(joint[known] / independent[known])).sum())


def average_precision(score: np.ndarray, positive: np.ndarray) -> float:
    """The mean, over the positive questions, of the precision when all that score at least as high are taken.

    NaN if none is positive. The share of positive ones if all scores are equal.
    """
    taken, found = _ranked(score, positive)
    return float((np.diff(found, prepend=0) * found / taken).sum() / found[-1]) if found[-1] else float("nan")


def precision_at_number(score: np.ndarray, positive: np.ndarray) -> float:
    """The precision of as many questions as are positive, taken by falling score; it is their recall as well.

    Of questions that tie for the last places, it is the mean over all choices. NaN if none is positive.
    """
    taken, found = _ranked(score, positive)
    number = found[-1]
    return float(np.interp(number, [0, *taken], [0, *found]) / number) if number else float("nan")


def _ranked(score: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many questions, and how many positive ones, score at least as high as each value, by falling value."""
    _, value = np.unique(-score, return_inverse=True)
    return np.bincount(value).cumsum(), np.bincount(value, weights=positive).cumsum()
