"""Scores a data set with an ensemble: the log-likelihood of every example under every particle.

Layout: K particles, N examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from renyi_engine.data import longest_first
from renyi_engine.ensemble import LoraEnsemble
from renyi_engine.objectives.task import Item, Task, length
from renyi_kernels import renyi_reduce


@dataclass(frozen=True)
class Evaluation:
    """Log-likelihoods logp [K, N] in nats, on CPU, of examples with num_labels [N] labels, each one a `unit`; and what
    else the task says of them, each [K, N], or [N] where it is the mixture's."""

    rows: list[int]
    unit: str
    num_labels: Tensor
    logp: Tensor
    details: dict[str, Tensor]

    def summary(self, alpha: float) -> dict[str, Any]:
        """Losses and spread, units in the names; a token's NLL is the corpus total over its tokens."""
        coupled = renyi_reduce(self.logp, alpha)
        return {
            "loss_nats": coupled.loss.mean().item(),
            **nll_per_label(self.logp, int(self.num_labels.sum()), self.unit),
            "ess_particles": coupled.ess.mean().item(),
            "num_examples": len(self.rows),
            **means(sums(self.details), len(self.rows)),
        }


def nll_per_label(logp: Tensor, num_labels: int, unit: str) -> dict[str, Any]:
    """Negative log-likelihood a `unit`, in nats: of the mixture (alpha = 1, Lemma 1), of the mean particle, of each.

    logp: [K, N] of examples that hold `num_labels` units together.
    """
    particles = -logp.sum(dim=1) / num_labels
    return {
        f"mixture_nll_nats_per_{unit}": renyi_reduce(logp, 1.0).loss.sum().item() / num_labels,
        f"mean_particle_nll_nats_per_{unit}": particles.mean().item(),
        f"particle_nll_nats_per_{unit}": particles.tolist(),
    }


def sums(details: Mapping[str, Tensor]) -> dict[str, float | list[float]]:
    """Over examples: K numbers of what is [K, N], one of what is [N]."""
    return {name: values.sum(dim=-1).tolist() for name, values in details.items()}


def means(totals: Mapping[str, float | list[float]], num_examples: int) -> dict[str, Any]:
    """An example's, from `sums`: over particles under its own name, and of each as particle_<name>."""
    metrics: dict[str, Any] = {}
    for name, total in totals.items():
        if isinstance(total, list):
            metrics[name] = sum(total) / len(total) / num_examples
            metrics[f"particle_{name}"] = [value / num_examples for value in total]
        else:
            metrics[name] = total / num_examples
    return metrics


@torch.no_grad()
def evaluate(ensemble: LoraEnsemble, task: Task, examples: Sequence[Item], batch_size: int) -> Evaluation:
    """Score every example under every particle. The result is in the order of `examples`."""
    order = longest_first(map(length, examples))
    parts = []
    for start in range(0, len(order), batch_size):
        scores = task.score(ensemble, task.collate([examples[i] for i in order[start : start + batch_size]]))
        parts.append({"logp": scores.logp, **scores.details})
    back = torch.tensor(order).argsort()
    scored = {name: torch.cat([part[name].float().cpu() for part in parts], dim=-1)[..., back] for name in parts[0]}
    num_labels = torch.tensor([example.num_labels for example in examples])
    return Evaluation([example.row for example in examples], task.unit, num_labels, scored.pop("logp"), scored)
