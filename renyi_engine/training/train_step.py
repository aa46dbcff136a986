"""One optimizer step. The whole method is here.

From the batches to the measurements, nothing asks the device for a value: what depends on a value is a mask. So the
step does not wait for the device, and `StepResult` holds tensors that may not be computed yet.

Layout: K particles, B sequences, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from renyi_engine.core import must_fit
from renyi_engine.ensemble import LoraEnsemble, with_gradients
from renyi_engine.objectives import Task, data_term, prior_term
from renyi_engine.training.config import TrainConfig
from renyi_engine.training.particle_optim import clip_grad_norms_, step_healthy
from renyi_kernels import renyi_reduce


@dataclass(frozen=True)
class StepResult:
    """The measurements of a step, and which particles it updated.

    Attributes:
        logp: [K, examples], nats. details: what else the task measured of the examples.
        loss, ess: [examples]. prior: a scalar, nats.
        mixture_nll: [examples], nats; of the mixture of those particles whose gradient is finite.
        norms: [K], nats; the norm of each particle's own gradient (see `train_step`), before it was clipped.
        spike: a scalar; whether the mean mixture_nll of the examples was above the largest one that is allowed.
        updated: [K]; which particles were updated.
        particle_weights: [K]; those of the particles after the step.
    """

    logp: Tensor
    details: dict[str, Tensor]
    loss: Tensor
    ess: Tensor
    prior: Tensor
    mixture_nll: Tensor
    norms: Tensor
    spike: Tensor
    updated: Tensor
    particle_weights: Tensor


def micro_step(ensemble: LoraEnsemble, task: Task, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The loss of one micro-batch, and what is measured of it. `inputs`: the batch, and beside it ``alpha`` and
    ``num_examples``, the number of examples in all micro-batches together.

    Returns:
        loss: a scalar, to be differentiated; see `train_step`. losses, ess: [examples]. logp: [K, examples], nats.
        And the task's details.
    """
    scores = task.score(ensemble, inputs)
    loss, reduction = data_term(scores.logp, inputs["alpha"], inputs["num_examples"])
    figures = {"losses": reduction.loss, "ess": reduction.ess, "logp": reduction.logp}
    return {"loss": ensemble.config.num_particles * loss, **figures, **scores.details}


def train_step(
    ensemble: LoraEnsemble,
    task: Task,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[Mapping[str, Tensor]],
    alpha: float | Tensor,
    config: TrainConfig,
    num_train_examples: int,
    num_examples: int | Tensor,
    largest_nll: float | Tensor = math.inf,
    tell: Callable[[str], object] = lambda event: None,
    run: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None = None,
) -> StepResult:
    """One optimizer step of all K particles: eq. (19), its gradient (21), and an update of each particle by itself.

    The gradients are K times those of (19) with its prior. Both are means over the particles, so without the factor a
    particle would get, at alpha = 0, only 1/K of the gradient that it has when it is trained alone. With the factor, a
    particle's norm, its clipping and the epsilon of AdamW mean the same as for one adapter that is trained alone, and
    at alpha = 0 the step is exactly K steps of single adapters.

    `num_examples` is the number of examples in all micro-batches together. It, `alpha` and `largest_nll` may be scalars
    on the device. `optimizer` has one parameter, the matrix of all particles.

    A particle whose gradient is not finite is not updated. No particle is updated if the mean NLL of the mixture, in
    nats, is above `largest_nll`.

    `run` does `micro_step` and its backward: `ensemble.captured` of it, which replays CUDA graphs, or None to run it as
    it is.

    `tell` is called at transformers' events within a step: on_substep_end after every micro-batch but the last, then
    on_pre_optimizer_step and on_optimizer_step.

    Raises:
        DoesNotFit: the device ran out of memory in a micro-batch.
    """
    particles, num_particles = ensemble.particles, ensemble.config.num_particles
    run = run or with_gradients(ensemble, partial(micro_step, ensemble, task))
    device = particles.values.device
    numbers = {
        name: value if isinstance(value, Tensor) else torch.full((), value, dtype=torch.float64, device=device)
        for name, value in (("alpha", alpha), ("num_examples", num_examples))
    }
    particles.zero_gradients()
    found = []
    for number, batch in enumerate(micro_batches, start=1):
        with must_fit(f"a micro-batch of {batch['input_ids'].numel()} tokens"):
            found.append(run({**batch, **numbers}))
        if number < len(micro_batches):
            tell("on_substep_end")
    prior = prior_term(
        config.prior,
        particles.values,
        weight=config.prior_lambda,
        num_examples=num_train_examples,
        std=config.prior_std,
        bandwidth=config.kernel_bandwidth,
    )
    if prior.requires_grad:
        particles.accumulate(num_particles * prior)
    norms = particles.gradient_norms()
    clip_grad_norms_(particles.gradients, norms, config.max_grad_norm)
    figures = {name: torch.cat([part[name] for part in found], dim=-1) for name in found[0] if name != "loss"}
    logp, healthy = figures.pop("logp"), norms.isfinite()
    mixture_nll = _mixture_nll(logp, healthy)
    spike = healthy.any() & (mixture_nll.mean() > largest_nll)
    updated = healthy & ~spike
    tell("on_pre_optimizer_step")
    step_healthy(optimizer, updated)
    tell("on_optimizer_step")
    return StepResult(
        logp=logp,
        loss=figures.pop("losses"),
        ess=figures.pop("ess"),
        details=figures,
        prior=prior.detach(),
        mixture_nll=mixture_nll,
        norms=norms,
        spike=spike,
        updated=updated,
        particle_weights=ensemble.particle_weights,
    )


def _mixture_nll(logp: Tensor, healthy: Tensor) -> Tensor:
    """-log of the mean probability (alpha = 1, Lemma 1) over the particles that are `healthy` [K]: [examples]."""
    of_all = renyi_reduce(logp.where(healthy[:, None], -torch.inf), 1.0).loss
    return of_all + (healthy.sum().clamp(min=1) / len(healthy)).log()
