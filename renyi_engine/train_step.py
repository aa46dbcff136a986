"""One optimizer step: the whole of the method.

Layout: K particles, B sequences, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from renyi_engine.config import TrainConfig
from renyi_engine.ensemble import LoraEnsemble
from renyi_engine.objective import data_term
from renyi_engine.particle_optim import clip_grad_norms_, grad_norms, step_healthy
from renyi_engine.prior import prior_term
from renyi_engine.task import Task


class OutOfMemory(RuntimeError):
    """A micro-batch did not fit into the device's memory. Parameters and moments are as they were."""


@dataclass(frozen=True)
class StepResult:
    """logp [K, examples] nats of the step and the task's details of it, losses and ESS [examples], prior in nats, norms
    [K] before clipping, and which particles [K] were updated."""

    logp: Tensor
    details: dict[str, Tensor]
    loss: Tensor
    ess: Tensor
    prior: Tensor
    norms: Tensor
    updated: Tensor


def train_step(
    ensemble: LoraEnsemble,
    task: Task,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[Mapping[str, Tensor]],
    alpha: float,
    config: TrainConfig,
    num_train_examples: int,
    largest_loss: float = math.inf,
) -> StepResult:
    """One optimizer step of all K particles: eq. (19), its gradient (21), and an update of each particle by itself.

    No update of a particle whose gradient is not finite; of none if the mean loss, in nats, is above `largest_loss`.

    Raises:
        OutOfMemory: a micro-batch does not fit.
    """
    parameters = list(ensemble.parameters())
    num_examples = sum(len(batch["labels"]) for batch in micro_batches)
    optimizer.zero_grad()
    reductions, details = [], []
    for batch in micro_batches:
        with _that_may_not_fit(batch):
            scores = task.score(ensemble, batch)
            loss, reduction = data_term(scores.logp, alpha, num_examples)
            loss.backward()
        reductions.append(reduction)
        details.append(scores.details)
    prior = prior_term(
        config.prior,
        parameters,
        weight=config.prior_lambda,
        num_examples=num_train_examples,
        std=config.prior_std,
        bandwidth=config.kernel_bandwidth,
    )
    if prior.requires_grad:
        prior.backward()
    norms = grad_norms(parameters)
    clip_grad_norms_(parameters, norms, config.max_grad_norm)
    losses = torch.cat([r.loss.detach() for r in reductions])
    updated = norms.isfinite() & ~(losses.mean() > largest_loss)
    step_healthy(optimizer, updated)
    return StepResult(
        logp=torch.cat([r.logp for r in reductions], dim=1),
        details={name: torch.cat([part[name] for part in details], dim=-1) for name in details[0]},
        loss=losses,
        ess=torch.cat([r.ess for r in reductions]),
        prior=prior.detach(),
        norms=norms,
        updated=updated,
    )


@contextmanager
def _that_may_not_fit(batch: Mapping[str, Tensor]) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        labels = batch["labels"]
        raise OutOfMemory(
            f"{len(labels)} examples of {labels.shape[-1]} tokens: {str(error).splitlines()[0]}"
        ) from None
