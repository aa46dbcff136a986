"""Attention in a packed row, where several sequences stand one after the other.

While a model reads such a row, its config names an attention implementation of ours. transformers asks it for masks and
for attention. It answers with the model's own implementation, which it calls once for each sequence. So sliding
windows, soft caps and attention sinks are those of the model, and no sequence sees another one. The exception is a
shared beginning: the sequences that go on from it attend to its keys and values, which are computed once.

On a GPU, plain causal attention of a whole row is one call: see `varlen`. A compiled layer is given a mask of its own
kind, because torch.compile takes tensors and operators alone: see `sequence_attention`.

Layout: K particles (the rows of the model), N tokens of a packed row, H heads, D size of a head.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig
from transformers.masking_utils import AttentionMaskInterface

from renyi_engine.ensemble import sequence_attention, varlen

NAME = "renyi_packed"


class Segment(NamedTuple):
    """A part of a packed row: `length` tokens, which see themselves and the segment number `prefix` (-1: none)."""

    length: int
    prefix: int


class PackedMask:
    """What layers are given in place of a mask. `own(q_length, kv_length)` is the model's own mask, for one sequence
    whose last q_length tokens ask and whose kv_length tokens are seen; None where it is plainly causal.
    `is_plain(kv_length)`: whether it would be None for as many queries as keys, if it is a mask of "sdpa"."""

    def __init__(self, packing: Packing, own: Callable[[int, int], Any], is_plain: Callable[[int], bool]) -> None:
        self.packing = packing
        self._is_plain = is_plain
        self._own, self._made = own, dict[tuple[int, int], Any]()
        self._rows: dict[tuple[int, torch.device], varlen.Row] = {}

    @property
    def segments(self) -> Sequence[Segment]:
        return self.packing.segments

    def in_one_call(self, states: Tensor, num_tokens: int) -> varlen.Row | None:
        """How to attend in one call for the whole row in place of "sdpa". None if that cannot be, or if no kernel takes
        such queries. `states`: of the layer, or queries, [K, ...]."""
        if not varlen.is_for_the_kernel(states):
            return None
        place = states.shape[0], states.device  # the shared trunk runs one row, and other layers K
        if place not in self._rows:
            self._rows[place] = self.packing.row(num_tokens, *place)
        row = self._rows[place]
        return row if self._is_plain(row.max_k) else None

    def attend(self, attention: str, module: nn.Module, *states: Tensor, options: Mapping[str, Any]) -> Tensor:
        """Attention [K, N, H, D] of query, key and value, one call a sequence."""
        return sequence_attention.attend(attention, module, self, *states, options=options)

    def of(self, q_length: int, kv_length: int) -> Any:
        if (q_length, kv_length) not in self._made:
            self._made[q_length, kv_length] = self._own(q_length, kv_length)
        return self._made[q_length, kv_length]


class MaskInGraph:
    """What a compiled layer is given in place of a `PackedMask`, which is for one run of the layer alone."""

    def __init__(self, mask: PackedMask, layer: nn.Module, states: Tensor) -> None:
        """`states`: of the layer, [K, N, ...]."""
        self._row, self._dtype = mask.in_one_call(states, states.shape[1]), states.dtype
        self._ticket = sequence_attention.ticket(layer, mask)
        if self._row is not None:
            # a tensor without memory, because compiled code takes sizes that vary, but no numbers that do
            self._most = torch.empty(self._row.max_q, self._row.max_k, device="meta")
            for tensor in (self._row.ends_q, self._row.ends_k, self._row.keys, self._most):
                if tensor is not None:
                    torch._dynamo.maybe_mark_dynamic(tensor, list(range(tensor.dim())))

    def in_one_call(self, states: Tensor, num_tokens: int) -> varlen.Row | None:
        if self._row is None or states.dtype != self._dtype:
            return None
        max_q, max_k = self._most.shape
        return varlen.Row(self._row.ends_q, self._row.ends_k, max_q, max_k, self._row.keys)

    def attend(self, attention: str, module: nn.Module, *states: Tensor, options: Mapping[str, Any]) -> Tensor:
        return sequence_attention.attend_in_graph(attention, module, self._ticket, *states, options=options)


class Packing:
    """The sequences of one packed row. `config`: of the model that reads it. `batch`: see `data.pack`, `data.fill`."""

    def __init__(self, config: PreTrainedConfig, batch: Mapping[str, Tensor]) -> None:
        self._batch = batch
        parts = [config, *(getattr(config, name, None) for name in config.sub_configs)]
        parts = [part for part in parts if isinstance(part, PreTrainedConfig)]
        self._configs = [part for part in parts if part._attn_implementation is not None]

    @cached_property
    def segments(self) -> list[Segment]:
        if self._batch["segments"].is_cuda and torch.cuda.is_current_stream_capturing():
            # CUDA would not say what it means, and torch would not give back the memory of the graph
            raise RuntimeError("attention is one call for each sequence, whose length cannot be known beforehand")
        return [Segment(*segment) for segment in self._batch["segments"].tolist() if segment[0]]

    def row(self, num_tokens: int, num_particles: int, device: torch.device) -> varlen.Row:
        """The row for one call of attention. Rows that were filled up say what the longest parts are."""
        if "longest" in self._batch:
            max_q, max_k = self._batch["longest"].tolist()
        else:
            max_q = max(segment.length for segment in self.segments)
            max_k = max(
                segment.length + (self.segments[segment.prefix].length if segment.prefix >= 0 else 0)
                for segment in self.segments
            )
        keys = self._batch.get("keys")
        return varlen.row(self._batch["ends"], keys, (max_q, max_k), num_tokens, num_particles, device)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside the block, the model attends within the sequences of this row. Other threads' forwards go on as they
        were, although a config may belong to several models."""
        self._count(1)
        token = _running.set(self)
        try:
            yield
        finally:
            _running.reset(token)
            self._count(-1)

    def _count(self, change: int) -> None:
        """One more packed forward with these configs, or one less. As long as there is one, they name our attention."""
        with _changing_configs:
            attentions = [config._attn_implementation for config in self._configs]  # a config sets those of its parts
            for config, attention in zip(self._configs, attentions, strict=True):
                _forwards[id(config)] += change
                config._attn_implementation = _packed(attention) if _forwards[id(config)] else _own(attention)


_running: ContextVar[Packing | None] = ContextVar("renyi_engine_packing", default=None)
"""The packed row of the forward that this thread runs."""

_changing_configs = threading.Lock()
_forwards: Counter[int] = Counter()
"""How many packed forwards run with a config, by its id."""
_attentions: list[str] = []
"""The implementations of attention that packed rows were read with. Ours for number n is called NAME-n: models look for
words such as "flash" in these names."""


def running() -> Packing | None:
    """The packed row of the forward that this thread runs."""
    return _running.get()


def _packed(attention: str) -> str:
    """Our implementation that attends by `attention` within each sequence."""
    if attention.startswith(NAME):
        return attention
    if attention not in _attentions:
        _attentions.append(attention)
        name = f"{NAME}-{_attentions.index(attention)}"
        AttentionInterface.register(name, partial(_attend, attention))
        AttentionMaskInterface.register(name, partial(_mask, attention))
    return f"{NAME}-{_attentions.index(attention)}"


def _own(attention: str) -> str:
    """The implementation that ours stands for."""
    return _attentions[int(attention.removeprefix(f"{NAME}-"))] if attention.startswith(NAME) else attention


def _mask(attention: str, *, batch_size: int, q_length: int, kv_length: int, q_offset: int = 0, **options: Any) -> Any:
    """What transformers takes for the mask of a kind of layer; its `mask_function` says who sees whom."""
    packing, make = running(), AttentionMaskInterface()[attention]
    if packing is None:  # the forward of another thread, on a model with the same config
        return make(batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, **options)

    def own(q_length: int, kv_length: int) -> Any:
        alone = {"attention_mask": None, "q_offset": kv_length - q_length}
        return make(batch_size=1, q_length=q_length, kv_length=kv_length, **options | alone)

    def is_plain(num_keys: int) -> bool:
        # transformers asks the same before it leaves out a mask. It is not asked itself, because transformers before
        # 5.18 leaves out no mask while a CUDA graph is made
        window = options.get("local_size")
        return options.get("allow_is_causal_skip", True) and (window is None or num_keys < window)

    return PackedMask(packing, own, is_plain)


def _attend(
    attention: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, Any]:
    """Attention [K, N, H, D] of query, key and value, each [K, H, N, D]."""
    if not isinstance(attention_mask, MaskInGraph) and running() is None:  # see `_mask`
        attend = sequence_attention.implementation(attention, module)
        return attend(module, query, key, value, attention_mask, **options)
    if not isinstance(attention_mask, PackedMask | MaskInGraph):
        raise TypeError(f"{type(module).__name__} does not take its mask from transformers' interface")
    # other implementations than sdpa may be told of a window by an option, and not by a mask
    fits = attention == "sdpa" and varlen.fits(query, value, options)
    if fits and (row := attention_mask.in_one_call(query, query.shape[2])) is not None:
        return varlen.attend(query, key, value, row, options.get("scaling")), None
    return attention_mask.attend(attention, module, query, key, value, options=options), None
