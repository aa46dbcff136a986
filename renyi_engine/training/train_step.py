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
from renyi_engine.objectives import AVERAGING_RATE, Task, averaged, data_term, prior_term
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
    """The loss of one micro-batch, and what is measured of it. `inputs`: the batch, and beside it ``alpha``,
    ``num_examples``, the number of examples in all micro-batches together, and ``particle_weights`` [K].

    Returns:
        loss: a scalar, to be differentiated; see `train_step`. losses, ess: [examples]. logp: [K, examples], nats.
        And the task's details.
    """
    scores, weights = task.score(ensemble, inputs), inputs["particle_weights"]
    if scores.logp.requires_grad:
        scores.logp.register_hook(partial(_divided_by_weights, weights))
    loss, reduction = data_term(scores.logp, inputs["alpha"], inputs["num_examples"], weights)
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

    The gradients are those of (19) with its prior, each particle's divided by its weight. Both terms are means over the
    particles, by the weights, so without the division a particle would get, at alpha = 0, only its weight times the
    gradient that it has when it is trained alone. With it, a particle's norm, its clipping and the epsilon of AdamW
    mean the same as for one adapter that is trained alone, and at alpha = 0 the step is exactly K steps of single
    adapters, whatever the weights are. At alpha > 0, the gradient that particle k has of example i gets the factor
    ``r_ki / w_k``. The mean of these factors is 1 if the particle's weight is its mean responsibility. A particle of
    weight 0 gets no gradient of the data.

    The priors are those of equal weights. For the potential, weights would change nothing: the gradient of ``sum_k w_k
    ||phi_k||^2``, divided by the weights, does not depend on them.

    If ``config.particle_weights`` is "learned", the step then moves `ensemble.particle_weights` towards the mean
    responsibilities of its examples, with which they were trained: see `averaged`. A particle that is not updated keeps
    its weight, and the others share the rest.

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
    numbers["particle_weights"] = weights = ensemble.particle_weights
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
    logp_of_healthy, weights_of_healthy = logp.where(healthy[:, None], -torch.inf), _among(healthy, weights)
    mixture_nll = renyi_reduce(logp_of_healthy, 1.0, weights=weights_of_healthy).loss
    spike = healthy.any() & (mixture_nll.mean() > largest_nll)
    updated = healthy & ~spike
    tell("on_pre_optimizer_step")
    step_healthy(optimizer, updated)
    tell("on_optimizer_step")
    if config.particle_weights == "learned":
        reduction = renyi_reduce(logp_of_healthy.double(), numbers["alpha"], weights=weights_of_healthy)
        floor = config.particle_weight_floor / num_particles
        moved = _moved(weights, reduction.responsibilities, healthy, floor)
        weights = moved.where(updated.any(), weights)
        ensemble.particle_weights.copy_(weights)
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
        particle_weights=weights,
    )


def _divided_by_weights(weights: Tensor, gradient: Tensor) -> Tensor:
    """The gradient [K, examples] times 1 / (K w_k): exactly the same for equal weights. 0 where w_k is 0, or so small
    that the factor does not fit fp32."""
    K = len(weights)
    factors = torch.where(weights > 1e-30, 1 / K / weights, 0.0)
    return gradient * factors.to(gradient.dtype)[:, None]


def _among(healthy: Tensor, weights: Tensor) -> Tensor:
    """The weights of the particles that are `healthy` [K], brought to the sum 1, and 0 for the others. If none of them
    has a weight, all weights as they are."""
    of_healthy = weights * healthy
    total = of_healthy.sum()
    return torch.where(total > 0.0, of_healthy / total, weights)


def _moved(weights: Tensor, responsibilities: Tensor, healthy: Tensor, floor: float) -> Tensor:
    """The weights [K] after a step of `averaged`. The responsibilities [K, examples] are those among the particles that
    are `healthy` [K]; these share what the others leave, which keep their weights, unless the floor raises one: that
    scales all others."""
    responsibilities = responsibilities * (weights * healthy).sum()
    return averaged(weights, responsibilities.where(healthy[:, None], weights[:, None]), AVERAGING_RATE, floor)
