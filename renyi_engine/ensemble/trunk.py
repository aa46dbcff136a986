"""The shared trunk: layers below the first adapted one run once for all particles.

At the first adapted layer, B rows become K*B, particle-major. A layer is given more than hidden states: masks,
positions and other things that differ from model to model. Two runs, with 2 rows and with 3, show which of the
arguments hold rows, and in which dimension: those that grew from the first run to the second.

Layout: K particles, B sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from renyi_engine.ensemble.adapted_maps import Rows

Key = tuple[int | str, ...]
"""One of a layer's arguments: its place or name, then places inside tuples, and last how many dimensions it has."""

HIDDEN = (0, "hidden_states")
"""A layer is given its hidden states as the first argument, or by this name."""

RowDimensions = Mapping[Key, tuple[int, int]]
"""The arguments of one layer that hold rows: (in which dimension, the size of that dimension for one row)."""


class LayerArguments:
    """The shapes of what layers are given in one run, and in `calls` how often each layer runs."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.shapes: list[dict[Key, torch.Size]] = [{} for _ in layers]
        self.calls = [0 for _ in layers]
        self._layers, self._handles = list(layers), list[RemovableHandle]()

    def install(self) -> None:
        self._handles = [
            layer.register_forward_pre_hook(partial(self._record, place), with_kwargs=True)
            for place, layer in enumerate(self._layers)
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _record(self, place: int, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        self.calls[place] += 1
        self.shapes[place].update({key: tensor.shape for key, tensor in _tensors(args, kwargs)})


def row_dimensions(two: LayerArguments, three: LayerArguments) -> list[RowDimensions] | None:
    """The row dimensions of every layer, from a run with 2 rows and a run with 3. None if they do not show it, or if a
    layer runs more than once."""
    if any(calls > 1 for calls in (*two.calls, *three.calls)):
        return None
    layers: list[RowDimensions] = []
    for small, large in zip(two.shapes, three.shapes, strict=True):
        found: dict[Key, tuple[int, int]] = {}
        for key in small.keys() & large.keys():
            grown = [d for d, (a, b) in enumerate(zip(small[key], large[key], strict=True)) if a != b]
            if len(grown) > 1 or any(small[key][d] * 3 != large[key][d] * 2 for d in grown):
                return None
            if grown:
                found[key] = (grown[0], small[key][grown[0]] // 2)
        if small and not any(key[0] in HIDDEN for key in found):
            return None
        layers.append(found)
    return layers


class SharedTrunk:
    """Hooks that bring the arguments of layers from B to K*B rows."""

    def __init__(
        self,
        layers: Sequence[nn.Module],
        rows: Sequence[RowDimensions],
        num_particles: int,
        running: Callable[[], Rows],
    ) -> None:
        """`layers` are those from the first adapted one on, and `rows` are their `row_dimensions`. `running()` gives
        the rows of the forward that is running."""
        self._num_particles, self._running = num_particles, running
        self._repeated: dict[int, tuple[Tensor, Tensor]] = {}
        self._handles = [
            layer.register_forward_pre_hook(partial(self._enter, place == 0, known), with_kwargs=True)
            for place, (layer, known) in enumerate(zip(layers, rows, strict=True))
        ]

    def __getstate__(self) -> dict[str, Any]:
        """What a copy gets. Nothing is running in the copy, and its tensors have other ids."""
        return {**vars(self), "_repeated": {}}

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def forget(self) -> None:
        self._repeated.clear()

    def _enter(
        self, is_first: bool, known: RowDimensions, layer: nn.Module, args: tuple, kwargs: dict
    ) -> tuple[tuple, dict] | None:
        if self._running() is not Rows.SHARED or (self._num_particles == 1 and not is_first):
            return None
        if not known:
            raise RuntimeError(
                f"a {type(layer).__name__} ran, which does not run on text alone; give the model text alone"
            )
        place, hidden = next((k, tensor) for k, tensor in _tensors(args, kwargs) if k in known and k[0] in HIDDEN)
        dimension, size = known[place]
        # the layers after the first adapted one are given hidden states that already have K*B rows
        num_sequences = hidden.shape[dimension] // size // (1 if is_first else self._num_particles)
        bring = partial(self._bring, known, num_sequences, hidden if is_first else None)
        return (
            tuple(bring((number,), value) for number, value in enumerate(args)),
            {name: bring((name,), value) for name, value in kwargs.items()},
        )

    def _bring(self, known: RowDimensions, num_sequences: int, trunk_end: Tensor | None, key: Key, value: Any) -> Any:
        """One argument of a layer, with K*B rows if it holds B. It is a method and no local function: a local function
        that calls itself would keep hidden states, and with them the graph, until Python's garbage collection."""
        if isinstance(value, (tuple, list)):
            return type(value)(
                self._bring(known, num_sequences, trunk_end, (*key, number), item) for number, item in enumerate(value)
            )
        place = (*key, value.dim()) if isinstance(value, Tensor) else key
        if place not in known:
            return value
        dimension, size = known[place]
        # it is one row for all sequences (a mask without padding), or it has the rows of every particle already
        if value.shape[dimension] != size * num_sequences:
            return value
        if value is trunk_end or value.requires_grad:
            # no layer below has an adapter, so the gradient may end here
            rows = repeat_rows(value.detach(), self._num_particles, dimension)
            return rows.requires_grad_(value.requires_grad)
        # all layers get one copy of a mask, because autograd keeps every mask that it meets
        if id(value) not in self._repeated:
            self._repeated[id(value)] = (value, repeat_rows(value, self._num_particles, dimension))
        return self._repeated[id(value)][1]


def repeat_rows(value: Tensor, times: int, dimension: int = 0) -> Tensor:
    """[..., B, ...] -> [..., times * B, ...], particle-major."""
    shape = list(value.shape)
    repeated = value.unsqueeze(dimension).expand(*shape[:dimension], times, *shape[dimension:])
    return repeated.reshape(*shape[:dimension], times * shape[dimension], *shape[dimension + 1 :])


def _tensors(args: tuple, kwargs: Mapping[str, Any]) -> Iterator[tuple[Key, Tensor]]:
    def walk(key: Key, value: Any) -> Iterator[tuple[Key, Tensor]]:
        if isinstance(value, Tensor):
            yield (*key, value.dim()), value
        elif isinstance(value, (tuple, list)):
            for place, item in enumerate(value):
                yield from walk((*key, place), item)

    for place, value in enumerate(args):
        yield from walk((place,), value)
    for name, value in kwargs.items():
        yield from walk((name,), value)
