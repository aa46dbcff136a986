"""renyi_loss: from hidden states to the alpha-Renyi loss. It is the op for a training loop of your own.

Layout: K particles, B sequences, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from renyi_kernels.linear_logprob import linear_logprob
from renyi_kernels.reference import IGNORE_INDEX
from renyi_kernels.renyi_reduce import RenyiOutput, check_alpha_for, check_weights_for, renyi_reduce


def renyi_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    alpha: float | Tensor,
    *,
    weights: Tensor | None = None,
    **head: Any,
) -> RenyiOutput:
    """The coupled loss of K particles from their hidden states: `renyi_reduce` of `linear_logprob`.

    Args:
        hidden: ``[K, B, T, D]``, the final-norm output of each particle.
        weight: ``[V, D]``, the frozen head.
        labels: ``[B, T]`` int64, already shifted; -100 where no token counts. All particles share them.
        alpha: finite, >= 0; a number or a tensor, as in `renyi_reduce`.
        weights: ``[K]``, of the particles, or None: 1/K each; as in `renyi_reduce`.
        **head: `bias`, `logit_softcap`, `logit_scale`, `chunk_mib`, `all_labelled`, `backend`, as in `linear_logprob`.

    Returns:
        RenyiOutput. Its `loss` ``[B]``, in nats, is differentiable in hidden.

    Raises:
        ValueError, TypeError: as the two ops.
    """
    alpha = check_alpha_for(hidden, alpha)
    if hidden.dim() != 4:
        raise ValueError(f"hidden: expected [K, B, T, D]; got {list(hidden.shape)}")
    if labels.shape != hidden.shape[1:3]:
        raise ValueError(f"labels: expected [B, T] = {list(hidden.shape[1:3])}; got {list(labels.shape)}")
    weights = check_weights_for(hidden, weights)
    token_logp = linear_logprob(hidden, weight, labels.expand(hidden.shape[:3]), **head)
    mask, backend = labels != IGNORE_INDEX, head.get("backend")
    return renyi_reduce(token_logp, alpha, mask=mask, weights=weights, backend=backend)
