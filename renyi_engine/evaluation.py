"""What an ensemble makes of held-out examples.

Layout: K particles, N examples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from renyi_engine.data import Example
from renyi_engine.ensemble import LoraEnsemble
from renyi_kernels import renyi_reduce


@dataclass(frozen=True)
class Evaluation:
    """Sequence log-likelihoods logp [K, N] in nats, on CPU, of examples with num_tokens [N] labelled tokens."""

    rows: list[int]
    num_tokens: Tensor
    logp: Tensor

    def summary(self, alpha: float) -> dict[str, Any]:
        """Losses and spread, units in the names; a token's NLL is the corpus total over its tokens."""
        coupled = renyi_reduce(self.logp, alpha)
        return {
            "loss_nats": coupled.loss.mean().item(),
            **nll_per_token(self.logp, int(self.num_tokens.sum())),
            "ess_particles": coupled.ess.mean().item(),
            "num_examples": len(self.rows),
        }


def nll_per_token(logp: Tensor, num_tokens: int) -> dict[str, Any]:
    """Negative log-likelihood a token, in nats: of the mixture (alpha = 1, Lemma 1), of the mean particle, of each.

    logp: [K, N] of examples that hold `num_tokens` labelled tokens together.
    """
    particles = -logp.sum(dim=1) / num_tokens
    return {
        "mixture_nll_nats_per_token": renyi_reduce(logp, 1.0).loss.sum().item() / num_tokens,
        "mean_particle_nll_nats_per_token": particles.mean().item(),
        "particle_nll_nats_per_token": particles.tolist(),
    }


@torch.no_grad()
def evaluate(
    ensemble: LoraEnsemble,
    examples: Sequence[Example],
    collate: Callable[[Sequence[Example]], Mapping[str, Tensor]],
    logp: Callable[[LoraEnsemble, Mapping[str, Tensor]], Tensor],
    batch_size: int,
) -> Evaluation:
    """Score every example under every particle. Batches are of similar length; the result is in the order given."""
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i].input_ids))
    scores = torch.empty(ensemble.config.num_particles, len(examples))
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        scores[:, part] = logp(ensemble, collate([examples[i] for i in part])).float().cpu()
    num_tokens = torch.tensor([example.num_labels for example in examples])
    return Evaluation([example.row for example in examples], num_tokens, scores)
