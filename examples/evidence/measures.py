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
