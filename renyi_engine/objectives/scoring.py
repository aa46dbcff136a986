"""Scores a data set with an ensemble: the log-likelihood of every example under every particle.

Layout: K particles, N examples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from renyi_engine.data import Filler, RowSizes, longest_first
from renyi_engine.ensemble import LoraEnsemble, records
from renyi_engine.objectives.metrics import ESS, LOSS, nll_per, of_particles
from renyi_engine.objectives.task import Item, Task, batch_of, length
from renyi_kernels import renyi_reduce


@dataclass(frozen=True)
class Evaluation:
    """Log-likelihoods logp [K, N] in nats, on CPU, of examples with num_labels [N] labels, each one a `unit`; what else
    the task says of them, each [K, N], or [N] where it is the mixture's; and the weights [K] that the particles had."""

    rows: list[int]
    unit: str
    num_labels: Tensor
    logp: Tensor
    details: dict[str, Tensor]
    particle_weights: Tensor

    def summary(self, alpha: float) -> dict[str, Any]:
        """Losses and spread under the names of `metrics`; a token's NLL is the corpus total over its tokens. Means over
        the particles are by their weights, so the mean particle's NLL is the loss at alpha = 0 (Lemma 1)."""
        coupled = renyi_reduce(self.logp, alpha, weights=self.particle_weights)
        return {
            LOSS.name: coupled.loss.mean().item(),
            **self._nll(),
            ESS.name: coupled.ess.mean().item(),
            "num_examples": len(self.rows),
            **means(sums(self.details), len(self.rows), self.particle_weights.tolist()),
        }

    def _nll(self) -> dict[str, Any]:
        names, num_labels = nll_per(self.unit), int(self.num_labels.sum())
        particles, weights = (-self.logp.sum(dim=1) / num_labels).tolist(), self.particle_weights
        return {
            names.mixture.name: renyi_reduce(self.logp, 1.0, weights=weights).loss.sum().item() / num_labels,
            names.mean_particle.name: mean_particle(particles, weights.tolist()),
            names.particles.name: particles,
        }


def sums(details: Mapping[str, Tensor]) -> dict[str, float | list[float]]:
    """Sums over the examples: K numbers for a quantity [K, N], one number for a quantity [N]."""
    return {name: values.sum(dim=-1).tolist() for name, values in details.items()}


def means(totals: Mapping[str, float | list[float]], num_examples: int, weights: Sequence[float]) -> dict[str, Any]:
    """Means over examples, from `sums`: of what is [K, N], the `mean_particle` too, and then each particle's."""
    found: dict[str, Any] = {}
    for name, total in totals.items():
        if isinstance(total, list):
            found[name] = mean_particle(total, weights) / num_examples
            found[of_particles(name)] = [value / num_examples for value in total]
        else:
            found[name] = total / num_examples
    return found


def mean_particle(values: Sequence[float], weights: Sequence[float]) -> float:
    """sum_k w_k v_k of one value for each particle. A particle of weight 0 does not count, whatever its value. Equal
    weights give the plain mean, bit for bit."""
    counted = [(weight / max(weights), value) for weight, value in zip(weights, values, strict=True) if weight > 0]
    return sum(relative * value for relative, value in counted) / sum(relative for relative, _ in counted)


class Scorer:
    """Scores the same examples under every particle, as often as it is called.

    On a GPU, the forwards are recorded as CUDA graphs, unless `cuda_graphs` is False or the model cannot read packed
    rows: see `LoraEnsemble.captured`.
    """

    def __init__(
        self,
        ensemble: LoraEnsemble,
        task: Task,
        examples: Sequence[Item],
        batch_size: int,
        *,
        cuda_graphs: bool = True,
    ) -> None:
        self.ensemble, self.task, self.examples = ensemble, task, examples
        order = longest_first(map(length, examples))
        self._parts = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        self._back = torch.tensor(order).argsort()
        self._fill: Filler | None = None
        # no method of its own: graphs would then live, with their memory, until Python collects garbage
        self._run: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = partial(_score, ensemble, task)
        if cuda_graphs and ensemble.packs and records(ensemble.particles.values.device):
            self._fill = Filler(RowSizes.of(self._batch(part)) for part in self._parts)
            self._run = ensemble.captured(self._run, compared=["logp"])

    @torch.no_grad()
    def __call__(self) -> Evaluation:
        """The scores, in the order of the examples."""
        found = []
        for part in self._parts:
            batch = self._batch(part)
            found.append(self._run(batch if self._fill is None else self._fill(batch)))
        scored = {
            name: torch.cat([part[name].float().cpu() for part in found], dim=-1)[..., self._back] for name in found[0]
        }
        num_labels = torch.tensor([example.num_labels for example in self.examples])
        rows = [example.row for example in self.examples]
        weights = self.ensemble.particle_weights.cpu()
        return Evaluation(rows, self.task.unit, num_labels, scored.pop("logp"), scored, weights.clone())

    def _batch(self, part: Sequence[int]) -> Mapping[str, Tensor]:
        return batch_of(self.task, self.ensemble, [self.examples[i] for i in part])


def _score(ensemble: LoraEnsemble, task: Task, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    scores = task.score(ensemble, batch)
    return {"logp": scores.logp, **scores.details}


def evaluate(ensemble: LoraEnsemble, task: Task, examples: Sequence[Item], batch_size: int) -> Evaluation:
    """Score every example under every particle, once: see `Scorer`."""
    return Scorer(ensemble, task, examples, batch_size)()
