"""A loss of an ensemble and its gradients, recorded once for every shape of its inputs: see `core.cuda_graphs`.

Layout: K particles, P numbers of one particle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from renyi_engine.core import Pool, Recordings, Surroundings
from renyi_engine.ensemble.adapted_maps import Rows
from renyi_engine.ensemble.particle_matrix import ParticleMatrix

Function = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


class Trainable(Protocol):
    """What is needed of a `LoraEnsemble`, which says what these mean."""

    particles: ParticleMatrix
    graph_pool: Pool
    training: bool

    @property
    def model(self) -> PreTrainedModel: ...
    @property
    def rows(self) -> Rows: ...
    def buffers(self) -> Iterator[Tensor]: ...


APART = {torch.float32: 1e-3, torch.float64: 1e-3}
APART_LOW = 0.05
"""How far a recording may be from the plain call, by the dtype of the base. Some kernels add in no fixed order, so two
plain calls differ too."""


def with_gradients(ensemble: Trainable, function: Function) -> Function:
    """`function`, and after it the backward of its output "loss": the gradients are added to the particles' gradients.
    What it returns is detached."""

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        outputs = function(inputs)
        if "loss" in outputs and outputs["loss"].requires_grad:
            ensemble.particles.accumulate(outputs["loss"])
        return {name: tensor.detach() for name, tensor in outputs.items()}

    return run


def captured(ensemble: Trainable, function: Function, *, compared: Sequence[str] = ()) -> Function:
    """`function` as CUDA graphs: on a GPU, Python then orders all of its work at once instead of kernel by kernel.

    >>> def loss(inputs):                                   # inputs: a batch, and whatever else changes between steps
    ...     reduction = renyi_reduce(ensemble.sequence_logprob(inputs), inputs["alpha"])
    ...     return {"loss": reduction.loss.mean(), "ess": reduction.ess}
    >>> step = ensemble.captured(loss)
    >>> optimizer.zero_grad()
    >>> outputs = step({**batch, "alpha": alpha})           # adds to the gradients, as outputs["loss"].backward() would
    >>> optimizer.step()

    Args:
        function: takes a dict of tensors and gives one. If its output "loss" requires a gradient, it is differentiated,
            and the gradients are added to those of `ensemble.parameters()`.
        compared: the outputs that a graph is judged by, beside the gradients; without names: the loss, or all outputs
            if there is no loss.

    Returns:
        A function that takes and gives what `function` does. The outputs are detached. The first time that it is called
        with inputs of a shape, it runs `function` as it is, makes the graph, and compares both. If they differ,
        or if no graph can be made, a warning says why, and `function` runs as it is from then on. On a CPU it always
        does.

    `function` must not

    - look at the values of its inputs in Python: no ``.item()``, ``if tensor:``, ``nonzero``, or indexing by a mask;
    - use Python numbers or tensors that change between calls, beside its inputs and the parameters of the ensemble;
    - keep tensors for later, print, or do anything else that has to happen at every call;
    - draw random numbers.

    A hook that is put on a parameter later has no effect. No graph of an earlier backward may be kept when `function`
    is called with inputs of a new shape.

    Packed rows (`data.pack`) can be captured, filled up to sizes that many of them share (`data.fill`). One that was
    not filled up is run as it is. Other batches cannot: transformers looks into the mask of a padded batch in Python,
    and the head looks for the labels ``[B, T]`` that count. Layers that are checkpointed must be given
    ``preserve_rng_state=False``, as `Trainer` does.
    """
    run, device = with_gradients(ensemble, function), ensemble.particles.values.device
    if not records(device):
        return run
    particles = ensemble.particles
    # the numbers of quantised weights lie in memory of their own
    base = [weight for weight in ensemble.model.parameters() if type(weight) is torch.nn.Parameter]

    def added_to() -> list[Tensor]:
        return [particles.gradients] if torch.is_grad_enabled() else []

    def read() -> list[Tensor]:
        copy = [] if particles.copy is None else [particles.copy]
        return [particles.values, *copy, *ensemble.buffers(), *base]

    def mode() -> tuple[object, ...]:
        autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
        learning = torch.is_grad_enabled() and particles.learning
        return ensemble.rows, ensemble.training, learning, autocast

    recordings = Recordings(
        run,
        device,
        Surroundings(added_to, read, mode),
        compared=lambda outputs: compared or (["loss"] if "loss" in outputs else list(outputs)),
        tolerance=APART.get(ensemble.model.dtype, APART_LOW),
        constants=("longest",),
        pool=ensemble.graph_pool,
    )

    def call(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if "segments" in inputs and "longest" not in inputs:  # a packed row that was not filled up
            return run(inputs)
        if torch.is_grad_enabled():
            particles.attach_gradients()
        return recordings(inputs)

    return call


def records(device: torch.device) -> bool:
    """Whether work on this device is recorded."""
    return device.type == "cuda"
