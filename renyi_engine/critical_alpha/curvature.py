"""The curvature of a language model around one LoRA adapter, from derivatives of every example by itself.

K equal particles are K copies of one adapter. If each particle reads an example of its own, the gradient of particle k
is the gradient of example k. The ops take their reference path, and attention runs as plain products: both can be
differentiated to any order.

Layout: K particles, N examples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from renyi_engine.core import seeding, track
from renyi_engine.critical_alpha.derivatives import Batch
from renyi_engine.critical_alpha.projection import Projection
from renyi_engine.critical_alpha.subspace import project
from renyi_engine.data import longest_first
from renyi_engine.ensemble import LoraEnsemble, Rows
from renyi_engine.objectives import Item, Task, evaluate, length
from renyi_kernels import use_backend

CurvatureName = Literal["hessian", "gauss_newton"]
ESTIMATE_EXAMPLES, ESTIMATE_DIMS = 32, 8
"""How many examples and dimensions an estimate during training uses."""


def project_adapter(
    ensemble: LoraEnsemble,
    adapter: Sequence[Tensor],
    task: Task,
    items: Sequence[Item],
    num_dims: int,
    *,
    curvature: CurvatureName = "gauss_newton",
    prior_curvature: float = 0.0,
    seed: int = 0,
    quiet: bool = False,
) -> tuple[Projection, list[Tensor]]:
    """H and G of the task's log-likelihoods around one adapter. The examples of the result are in the order of `items`.

    Args:
        ensemble: lends its K particles as places for copies: K examples are computed at a time. It is restored after.
        adapter: its values, one [...] for each [K, ...] of `ensemble.parameters()`; see `particle`.
        num_dims: m.
        prior_curvature, seed: see `subspace.project`. Its check is left out if the base computes below fp32.
        curvature: "hessian", as in the paper: it curves downwards along some directions of every network that is not at
            a minimum. Or "gauss_newton", with the final hidden states as outputs: it is positive semidefinite for
            supervised log-likelihoods.
        quiet: show no progress.

    Returns:
        The projection, and the point that it is around. The point is `adapter`, or its B alone if all its B are zero:
        there the likelihood is flat along A, and bilinear in A and B together.

    Raises:
        ValueError: a part of the model cannot be differentiated twice, or a derivative is not finite.
    """
    slots = list(ensemble.parameters())
    B_only = all(not value.any() for value in adapter[1::2])
    moved = slice(1, None, 2) if B_only else slice(None)
    order = longest_first(map(length, items))
    K = ensemble.config.num_particles
    parts = [order[start : start + K] for start in range(0, len(order), K)]

    def log_likelihoods(point: Sequence[Tensor], what: str) -> Iterator[Batch]:
        copies = slots[moved]
        _fill(copies, point)
        for part in track(parts, what) if what and not quiet else parts:
            # a short last batch is filled up with copies, whose scores are dropped
            batch = task.collate([items[i] for i in part + part[-1:] * (K - len(part))])
            s = task.score(ensemble, batch).logp.view(K)[: len(part)]
            yield Batch(copies, s, hidden.pop() if curvature == "gauss_newton" else None)

    def keep(module: LoraEnsemble, args: tuple, output: Tensor) -> None:
        hidden[:] = [output]

    hidden: list[Tensor] = []
    handle = ensemble.register_forward_hook(keep)
    before, was_training = [slot.detach().clone() for slot in slots], ensemble.training
    try:
        ensemble.eval()
        _fill(slots, adapter)
        with use_backend("reference"), sdpa_kernel(SDPBackend.MATH), ensemble.running(Rows.OWN):
            point = [value.clone() for value in adapter[moved]]
            projection = project(
                point,
                log_likelihoods,
                num_dims,
                prior_curvature=prior_curvature,
                seed=seed,
                check=torch.finfo(ensemble.model.dtype).eps < 1e-6,
            )
    finally:
        handle.remove()
        ensemble.train(was_training)
        _fill(slots, before)
    back = torch.tensor(order).argsort()
    return replace(projection, scores=projection.scores[back], curvatures=projection.curvatures[back]), point


def particle(ensemble: LoraEnsemble, k: int) -> list[Tensor]:
    """The values of particle k: A and B of each adapted map in turn."""
    return [stack[k].detach().clone() for stack in ensemble.parameters()]


def estimate_alpha_star(
    ensemble: LoraEnsemble, task: Task, items: Sequence[Item], *, prior_curvature: float, seed: int
) -> float:
    """A quick estimate during training: from some of the `items`, around the particle that explains them best."""
    chosen = torch.randperm(len(items), generator=seeding.generator(seed))[:ESTIMATE_EXAMPLES].tolist()
    examples = [items[i] for i in chosen]
    logp = evaluate(ensemble, task, examples, batch_size=ensemble.config.num_particles).logp
    # a particle with NaN is never the best one
    best = particle(ensemble, int(logp.mean(dim=1).nan_to_num(nan=-torch.inf).argmax()))
    projection, _ = project_adapter(
        ensemble, best, task, examples, ESTIMATE_DIMS, prior_curvature=prior_curvature, seed=seed, quiet=True
    )
    return projection.critical_alpha().alpha


@torch.no_grad()
def _fill(slots: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy a value into every slot [K, ...]: one [...] for all K, or K of them."""
    for slot, value in zip(slots, values, strict=True):
        slot.copy_(value)
