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
from renyi_engine.objectives.metrics import ESS, LOSS, nll_per, of_particles
from renyi_engine.objectives.task import Item, Task, batch_of, length
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
        """Losses and spread under the names of `metrics`; a token's NLL is the corpus total over its tokens."""
        coupled = renyi_reduce(self.logp, alpha)
        return {
            LOSS.name: coupled.loss.mean().item(),
            **self._nll(),
            ESS.name: coupled.ess.mean().item(),
            "num_examples": len(self.rows),
            **means(sums(self.details), len(self.rows)),
        }

    def _nll(self) -> dict[str, Any]:
        names, num_labels = nll_per(self.unit), int(self.num_labels.sum())
        particles = -self.logp.sum(dim=1) / num_labels
        return {
            names.mixture.name: renyi_reduce(self.logp, 1.0).loss.sum().item() / num_labels,
            names.mean_particle.name: particles.mean().item(),
            names.particles.name: particles.tolist(),
        }


def sums(details: Mapping[str, Tensor]) -> dict[str, float | list[float]]:
    """Sums over the examples: K numbers for a quantity [K, N], one number for a quantity [N]."""
    return {name: values.sum(dim=-1).tolist() for name, values in details.items()}


def means(totals: Mapping[str, float | list[float]], num_examples: int) -> dict[str, Any]:
    """Means over examples, from `sums`: of what is [K, N], the mean over particles too, and then each particle's."""
    found: dict[str, Any] = {}
    for name, total in totals.items():
        if isinstance(total, list):
            found[name] = sum(total) / len(total) / num_examples
            found[of_particles(name)] = [value / num_examples for value in total]
        else:
            found[name] = total / num_examples
    return found


@torch.no_grad()
def evaluate(ensemble: LoraEnsemble, task: Task, examples: Sequence[Item], batch_size: int) -> Evaluation:
    """Score every example under every particle. The result is in the order of `examples`."""
    order = longest_first(map(length, examples))
    parts = []
    for start in range(0, len(order), batch_size):
        scores = task.score(
            ensemble, batch_of(task, ensemble, [examples[i] for i in order[start : start + batch_size]])
        )
        parts.append({"logp": scores.logp, **scores.details})
    back = torch.tensor(order).argsort()
    scored = {name: torch.cat([part[name].float().cpu() for part in parts], dim=-1)[..., back] for name in parts[0]}
    num_labels = torch.tensor([example.num_labels for example in examples])
    return Evaluation([example.row for example in examples], task.unit, num_labels, scored.pop("logp"), scored)
