"""The steps of decoding as CUDA graphs: the tokens of all rows in, the logits of the tokens after them out.

A graph repeats the same work on the same memory. So the cache does not grow with the tokens: its memory is given out
when decoding begins, long enough for all tokens, and every step is told to which place its tokens go. Lengths are
rounded up, so that batches of about the same length share a graph.

Layout: K particles, B prompts, T tokens, n samples, S = K*B*n rows, H heads, D size of a head, L places for tokens.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel, cache_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from renyi_engine.core import MOST_SHAPES, Pool, Recordings, Surroundings, is_out_of_memory
from renyi_engine.ensemble.adapted_maps import Rows
from renyi_engine.ensemble.captured import APART, APART_LOW
from renyi_engine.ensemble.model_limits import num_positions
from renyi_engine.ensemble.particle_matrix import ParticleMatrix

SHORTEST = 64
"""The fewest places of a cache."""
_ALIGNMENT = 256
"""Every tensor of a cache begins at a multiple of so many bytes."""
_EMPTY = getattr(cache_utils, "DummyLayer", ())
"""What stands in a cache for a layer that reads the keys and values of another one. Not every transformers has it."""


class Decoder(Protocol):
    """What the steps need of an ensemble. `LoraEnsemble` is the only such class, and it says what these mean."""

    particles: ParticleMatrix
    graph_pool: Pool

    @property
    def model(self) -> PreTrainedModel: ...
    @property
    def rows(self) -> Rows: ...
    def next_logits(
        self, input_ids: Tensor, attention_mask: Tensor, cache: Cache, positions: Tensor | None = None
    ) -> Tensor: ...


class Prompts(NamedTuple):
    """Prompts that were read.

    Attributes:
        logits: ``[S, V]`` of the first new token.
        mask: ``[S, T]``, 0 on padding, which is on the left.
        cache: what the model keeps of them.
        rows: by layer of the cache, ``[S]``: from which of its rows each row goes on.
    """

    logits: Tensor
    mask: Tensor
    cache: DynamicCache
    rows: Sequence[Tensor]


class FixedLayer(StaticLayer):
    """What one layer keeps: keys and values ``[S, H, L, D]``. The next ones go to `place`, which is ``[1]``."""

    def __init__(self, keys: Tensor, values: Tensor, place: Tensor) -> None:
        super().__init__(max_cache_len=keys.shape[2])
        self.keys, self.values, self.is_initialized = keys, values, True
        self.dtype, self.device = keys.dtype, keys.device
        self.cumulative_length = place[0]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        # a step that is repeated must do the same, so nothing is counted here
        place = self.cumulative_length[None]
        return self.keys.index_copy_(2, place, key_states), self.values.index_copy_(2, place, value_states)


class DecodeSteps:
    """The recorded steps of one ensemble, and the memory of their cache. Both are kept for the next batch. One batch at
    a time is decoded, and other threads wait. A deep copy has recorded nothing."""

    def __init__(self) -> None:
        self.usable: bool | None = None
        """Whether the model gives right values with this cache; None until it has been tried."""
        self._one_at_a_time = threading.RLock()
        self._recordings: Recordings | None = None
        self._memory: Tensor | None = None
        self._base: list[int] = []
        self._shapes: set[tuple[object, ...]] = set()
        # of the batch that is decoded
        self._layers: list[tuple[Tensor, ...] | Any] = []
        self._shape: tuple[object, ...] = ()
        self._length = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> DecodeSteps:
        return DecodeSteps()

    def drop(self) -> None:
        """Drop all recordings, and the memory of the cache."""
        if self._recordings is not None:
            self._recordings.drop()
        self._memory, self._layers = None, []
        self._shapes.clear()

    @contextmanager
    def alone(self) -> Iterator[DecodeSteps]:
        """A block for one batch, from the reading of its prompts to its last token. If memory runs out inside, all that
        is kept is dropped."""
        with self._one_at_a_time:
            try:
                yield self
            except Exception as error:
                if is_out_of_memory(error):
                    self.drop()
                raise

    def after(self, ensemble: Decoder, prompts: Prompts, max_new_tokens: int) -> Callable[[Tensor], Tensor]:
        """A function that takes tokens ``[S]`` and gives the logits ``[S, V]`` of the tokens after them, until the end
        of the block of `alone`. What `prompts.cache` holds is taken out of it.

        Raises:
            ValueError: a layer of this model keeps something else than keys and values.
        """
        with _ordinary_tensors():
            recordings = self._recordings_of(ensemble)
            self._begin(ensemble, prompts, max_new_tokens, recordings)
            T, padding = prompts.mask.shape[1], (prompts.mask == 0).sum(-1)
            places = iter(torch.arange(T, T + max_new_tokens, device=padding.device).split(1))

        def next_logits(tokens: Tensor) -> Tensor:
            with _ordinary_tensors():
                return recordings({"tokens": tokens, "place": next(places), "padding": padding})["logits"]

        return next_logits

    def _recordings_of(self, ensemble: Decoder) -> Recordings:
        """The recordings. They are made anew if the model lies elsewhere in memory than before."""
        tensors = (*ensemble.model.parameters(), *ensemble.model.buffers())
        base = [tensor.data_ptr() for tensor in tensors if type(tensor) in (Tensor, nn.Parameter)]
        if self._recordings is None or base != self._base:
            self.drop()
            self._base, particles = base, ensemble.particles
            self._recordings = Recordings(
                partial(self._step, ensemble),
                particles.values.device,
                Surroundings(
                    read=lambda: [t for t in (self._memory, particles.values, particles.copy) if t is not None],
                    mode=lambda: self._shape,
                ),
                tolerance=APART.get(ensemble.model.dtype, APART_LOW),
                compared=lambda outputs: ["logits"],
                pool=ensemble.graph_pool,
            )
        return self._recordings

    def _begin(self, ensemble: Decoder, prompts: Prompts, max_new_tokens: int, recordings: Recordings) -> None:
        (S, T), device = prompts.mask.shape, prompts.mask.device
        # the last token is drawn, but nobody reads it
        self._length = _rounded_up(T + max_new_tokens - 1, num_positions(ensemble.model))
        self._layers = self._take(prompts)
        autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
        self._shape = (ensemble.rows, S, self._length, autocast)
        if self._shape not in self._shapes and len(self._shapes) == MOST_SHAPES:
            recordings.drop()
            self._shapes.clear()
        self._shapes.add(self._shape)

    def _take(self, prompts: Prompts) -> list[tuple[Tensor, ...] | Any]:
        """(keys, values) of each layer, with what was kept of the prompts; or a layer of the cache that keeps
        nothing."""
        layers, (S, T) = prompts.cache.layers, prompts.mask.shape
        known = [type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers]
        for layer, fixed in zip(layers, known, strict=True):
            if not fixed and not isinstance(layer, _EMPTY):
                raise ValueError(f"a layer's cache is a {type(layer).__name__}, not keys and values alone")
        kept = [
            (layer.keys, layer.values) if fixed and layer.is_initialized else ()
            for layer, fixed in zip(layers, known, strict=True)
        ]
        wanted = [((S, x.shape[1], self._length, x.shape[3]), x.dtype) for pair in kept for x in pair]
        memory = iter(self._zeros(wanted, prompts.mask.device))
        taken: list[tuple[Tensor, ...] | Any] = []
        for layer, pair, rows in zip(layers, kept, prompts.rows, strict=True):
            views = tuple(next(memory) for _ in pair)
            for view, x in zip(views, pair, strict=True):
                view[:, :, T - x.shape[2] : T] = x[rows]  # a layer with a window keeps the last tokens alone
            taken.append(views or layer)
        layers.clear()
        return taken

    def _zeros(self, wanted: Sequence[tuple[tuple[int, ...], torch.dtype]], device: torch.device) -> list[Tensor]:
        """Tensors of zeros of these shapes and dtypes. They lie where those of the same shapes lay the last time."""
        starts, end = [], 0
        for shape, dtype in wanted:
            starts.append(end)
            end += -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        if self._memory is None or len(self._memory) < end:
            self.drop()  # now, so that the old memory and the new one are never there together
            self._memory = torch.empty(end, dtype=torch.uint8, device=device)
        # what an earlier batch left here may not be finite, and no mask would hide it then
        self._memory[:end].zero_()
        return [
            self._memory[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
            for start, (shape, dtype) in zip(starts, wanted, strict=True)
        ]

    def _step(self, ensemble: Decoder, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tokens, place, padding = inputs["tokens"], inputs["place"], inputs["padding"]
        places = torch.arange(self._length, device=place.device)
        mask = ((places >= padding[:, None]) & (places <= place)).long()
        layers = [
            FixedLayer(layer[0], layer[1], place) if isinstance(layer, tuple) else layer for layer in self._layers
        ]
        positions = (place - padding)[:, None]
        return {"logits": ensemble.next_logits(tokens[:, None], mask, Cache(layers=layers), positions)}


@contextmanager
def _ordinary_tensors() -> Iterator[None]:
    """Inside the block, tensors are made that may be written to later, which is not so in torch's inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _rounded_up(length: int, limit: int | None) -> int:
    """How many places a cache has for so many tokens: at most a quarter more. `limit`: more than the model can read."""
    step = 1 << max(length.bit_length() - 3, 0)
    rounded = max(-(-length // step) * step, SHORTEST)
    return rounded if limit is None else max(min(rounded, limit), length)
