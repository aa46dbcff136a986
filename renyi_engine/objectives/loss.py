"""From sequence log-likelihoods to the loss. SFT, DPO and whatever comes later differ only in how s [K, B] is made.

Layout: K particles, B sequences, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from renyi_kernels import RenyiOutput, renyi_reduce


def data_term(logp: Tensor, alpha: float, num_examples: int) -> tuple[Tensor, RenyiOutput]:
    """(1/|batch|) sum_i loss[i], eq. (19) divided through by N, and the reduction it came from.

    Args:
        logp: [K, B] nats; B may be a part of the batch (a micro-batch).
        num_examples: |batch|, examples in the whole optimizer step.

    A particle whose log-likelihood of an example is NaN is given no share of it, as if it were -inf: one broken
    particle must not take the others along. Its own gradient stays NaN; the trainer skips and counts its update.
    """
    out = renyi_reduce(logp.where(~logp.isnan(), -torch.inf), alpha)
    return out.loss.sum() / num_examples, out
