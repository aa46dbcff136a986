"""What an ensemble puts on its model so that the model's own forward runs all particles, and how it is taken off again.

    embedding and layers below the first adapted one     B rows, no gradient: the shared trunk (`trunk`)
    hooks on the first adapted layer and those above     B -> K*B rows
    every adapted linear map (`adapted_maps`)            base output + scaling * (x A_k^T) B_k^T
    maps that read the same input (q, k, v)              one op; on the input that all particles share, B rows
    RMS norms, on a GPU (`rms_norms`)                    one kernel
    layers, if that is asked for (`compiled_layers`)     compiled code

Some models' layers cannot be brought from B to K*B rows. There all K*B rows run from the start: slower, same values.

Layout: K particles, B sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from renyi_engine.ensemble import packed_attention, rms_norms, targets
from renyi_engine.ensemble.adapted_maps import MapGroup, OpaqueMap, Rows, adapted
from renyi_engine.ensemble.architecture import Architecture
from renyi_engine.ensemble.compiled_layers import CompiledLayers, Mode
from renyi_engine.ensemble.forwards import Forwards
from renyi_engine.ensemble.packed_attention import Packing
from renyi_engine.ensemble.particle_matrix import ParticleMatrix
from renyi_engine.ensemble.rms_norms import RmsNorm
from renyi_engine.ensemble.trunk import RowDimensions, SharedTrunk


class Installation:
    """The hooks, maps and functions of one ensemble on one model. A deep copy belongs to a copy of the model.

    The adapters of `particles` are in training mode when the ensemble is.
    """

    def __init__(self, model: PreTrainedModel, found: Architecture, particles: ParticleMatrix, scaling: float) -> None:
        layers_path, layers = targets.decoder_layers(model)
        numbers = {path: targets.layer_index(path, layers_path) for path in found.inputs}
        self.forwards = Forwards()
        self.layers = tuple(layers)
        self.maps: list[MapGroup | OpaqueMap] = []
        self.trunk: SharedTrunk | None = None
        self.compiled: CompiledLayers | None = None
        self._handles: list[RemovableHandle | Takeover | RmsNorm] = []
        self._model, self._found, self._particles, self._scaling = model, found, particles, scaling
        self._first_layer = min(numbers[path] for path in particles.stacks)
        # what the first adapted map reads is still the same for every particle
        first_paths = (path for path in found.inputs if path in particles.stacks and numbers[path] == self._first_layer)
        self._shared_input = found.inputs[next(first_paths)]

    @property
    def num_shared_layers(self) -> int:
        """The number of layers in the shared trunk."""
        return 0 if self.trunk is None else self._first_layer

    def put_on(self, row_dimensions: Sequence[RowDimensions] | None) -> None:
        """Put everything on the model. Without `row_dimensions` there is no shared trunk."""
        found = self._found
        for paths, adapters in zip(self._particles.paths, self._particles.groups, strict=True):
            linears = {path: self._model.get_submodule(path) for path in paths}
            shared = row_dimensions is not None and found.inputs[paths[0]] is self._shared_input
            group = adapted(linears, adapters, self._scaling, shared and paths[0] in found.once)
            group.install(self.forwards.rows)
            self.maps.append(group)
        if norms_in_one_kernel(self._particles.values.device):
            for norm in rms_norms.found(found.decoder):
                norm.install()
                self._handles.append(norm)
        self._handles.append(Takeover(found.decoder, "forward", self._decode))
        for layer in self.layers:
            for part in layer.children():
                self._handles.append(part.register_forward_pre_hook(partial(_turn_dropout_off, layer)))
        if row_dimensions is not None:
            first, K = self._first_layer, len(self._particles.values)
            self.trunk = SharedTrunk(self.layers[first:], row_dimensions[first:], K, self.forwards.rows)

    def compile(self, compiled: CompiledLayers) -> None:
        """Let the layers run as `compiled` has them."""
        self.compiled = compiled
        for layer in self.layers:
            self._handles.append(Takeover(layer, "forward", partial(compiled.forward, layer)))

    def take_off(self) -> None:
        """Take everything off the model."""
        if self.trunk is not None:
            self.trunk.remove()
        for part in [*self.maps, *self._handles]:
            part.remove()
        self.trunk = self.compiled = None
        self.maps.clear()
        self._handles.clear()

    @contextmanager
    def forward(self, rows: Rows, packing: Packing | None = None) -> Iterator[None]:
        """A block for one forward of the decoder, or of a layer that runs again for its backward. `packing`: of the
        packed row that it runs on."""
        with self.forwards.run(rows) as outermost:
            if not self.maps:
                raise RuntimeError("this ensemble was detached from its model; attach or load it again")
            try:
                with packing.running() if packing else nullcontext():
                    yield
            finally:
                if outermost:
                    self.forget()

    def in_mode(self, mode: Mode | None, *, in_checkpoint: bool = False) -> AbstractContextManager[None]:
        """Inside the block, which is inside one of `forward`, layers run compiled in this mode; None: uncompiled."""
        return nullcontext() if self.compiled is None else self.compiled.running(mode, in_checkpoint=in_checkpoint)

    def forget(self) -> None:
        """Drop what a forward or a checkpointed backward left behind, if it was cut short."""
        if self.trunk is not None:
            self.trunk.forget()
        for group in self.maps:
            group.forget()

    def _decode(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs in place of the decoder's `forward`, also when the model itself calls it."""
        with self.forward(self.forwards.asked):
            self._set_modes()
            device = self._particles.values.device.type
            low = torch.is_autocast_enabled(device)
            self._particles.refresh(torch.get_autocast_dtype(device) if low else self._model.dtype)
            return forward(*args, **kwargs)

    def _set_modes(self) -> None:
        """Put the base into evaluation mode, whoever called model.train(): a frozen base has no dropout.

        Hugging Face checkpoints a layer only if the layer is in training mode. So a layer that is to be checkpointed is
        put into that mode, while the ensemble is in it and gradients are on: a checkpointed layer cannot use a cache.
        """
        self._model.eval()
        learning = torch.is_grad_enabled() and next(iter(self._particles.stacks.values())).training
        for layer in self.layers:
            layer.training = learning and getattr(layer, "gradient_checkpointing", False)
            if layer.training and not isinstance(layer._gradient_checkpointing_func, Takeover):
                self._handles.append(Takeover(layer, "_gradient_checkpointing_func", self._checkpoint))

    def _checkpoint(self, checkpoint: Callable[..., Any], layer: Callable[..., Any], *args: Any) -> Any:
        """Runs in place of the function by which Hugging Face checkpoints a layer. The backward runs the layer again,
        often in a thread of autograd's, which does not know the rows, the packing and the mode of the first run."""
        mode = None if self.compiled is None else self.compiled.mode
        run = partial(self._run_layer, self.forwards.rows(), packed_attention.running(), mode, layer)
        return checkpoint(run, *args)

    def _run_layer(
        self, rows: Rows, packing: Packing | None, mode: Mode | None, layer: Callable[..., Any], *args: Any
    ) -> Any:
        with self.forward(rows, packing), self.in_mode(mode, in_checkpoint=True):
            return layer(*args)


class Takeover:
    """Stands in for a function of a module until `remove`: `instead(function, ...)` runs in its place."""

    def __init__(self, module: nn.Module, name: str, instead: Callable[..., Any]) -> None:
        self._module, self._name, self._instead = module, name, instead
        self._before = vars(module).get(name)
        self.__wrapped__ = getattr(module, name)  # for those who ask for the signature
        vars(module)[name] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._instead(self.__wrapped__, *args, **kwargs)

    def remove(self) -> None:
        own = vars(self._module)
        if own.get(self._name) is self:
            del own[self._name]
            if self._before is not None:
                own[self._name] = self._before


def norms_in_one_kernel(device: torch.device) -> bool:
    """Whether PyTorch has a kernel for RMS norms there."""
    return device.type == "cuda"


def _turn_dropout_off(layer: nn.Module, part: nn.Module, args: tuple) -> None:
    """Runs before a part of a layer. By then it is decided whether the layer is checkpointed, and from here on the
    layer's training flag only switches dropout (in OPT)."""
    if layer.training:
        layer.training = False
