"""From the log-likelihoods s [K, B] of examples to the loss. SFT and DPO differ only in how they make s.

Layout: K particles, B sequences, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from renyi_kernels import RenyiOutput, renyi_reduce


def data_term(
    logp: Tensor, alpha: float | Tensor, num_examples: int | Tensor, weights: Tensor | None = None
) -> tuple[Tensor, RenyiOutput]:
    """(1/|batch|) sum_i loss[i], which is eq. (19) divided by N, and the reduction that it comes from.

    Args:
        logp: s [K, B] in nats. B may be a part of the batch, a micro-batch.
        num_examples: |batch|, the number of examples in the whole optimizer step.
        weights: of the particles, [K]; see `renyi_reduce`. None: 1/K each.

    If the log-likelihood of a particle is NaN, the particle gets responsibility 0 for that example, as if it were -inf:
    one sick particle must not spoil the others. Its own gradient stays NaN; the trainer skips and counts its update.
    """
    out = renyi_reduce(logp.where(~logp.isnan(), -torch.inf), alpha, weights=weights)
    return out.loss.sum() / num_examples, out
