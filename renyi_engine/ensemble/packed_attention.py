"""Attention in a packed row, where several sequences stand one after the other.

While a model reads such a row, its config names an attention implementation of ours. transformers asks it for masks and
for attention. It answers with the model's own implementation, which it calls once for each sequence. So sliding
windows, soft caps and attention sinks are those of the model, and no sequence sees another one. The exception is a
shared beginning: the sequences that go on from it attend to its keys and values, which are computed once.

On a GPU, plain causal attention of a whole row is one call: see `varlen`.

Layout: K particles (the rows of the model), N tokens of a packed row, H heads, D size of a head.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from renyi_engine.ensemble import varlen

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

    def in_one_call(self, query: Tensor, value: Tensor, options: Mapping[str, Any]) -> varlen.Row | None:
        """How to attend in one call for the whole row, in place of "sdpa"; None if that cannot be."""
        if not varlen.can_take(query, value, options):
            return None
        place = query.shape[0], query.device  # the shared trunk runs one row, and other layers K
        if place not in self._rows:
            self._rows[place] = self.packing.row(query.shape[2], *place)
        row = self._rows[place]
        return row if self._is_plain(row.max_k) else None

    def of(self, q_length: int, kv_length: int) -> Any:
        if (q_length, kv_length) not in self._made:
            self._made[q_length, kv_length] = self._own(q_length, kv_length)
        return self._made[q_length, kv_length]


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
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(attention, eager)
    if running() is None:  # see `_mask`
        return attend(module, query, key, value, attention_mask, **options)
    if not isinstance(attention_mask, PackedMask):
        raise TypeError(f"{type(module).__name__} does not take its mask from transformers' interface")
    # other implementations than sdpa may be told of a window by an option, and not by a mask
    row = attention_mask.in_one_call(query, value, options) if attention == "sdpa" else None
    if row is not None:
        return varlen.attend(query, key, value, row, options.get("scaling")), None
    options.pop("position_ids", None)  # those of the whole row, by which flash attention would cut a sequence again

    def by_sequence(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        segments = attention_mask.packing.segments
        lengths = [segment.length for segment in segments]
        queries, keys, values = (states.split(lengths, dim=2) for states in (query, key, value))
        outputs = []
        for (length, prefix), q, k, v in zip(segments, queries, keys, values, strict=True):
            if prefix >= 0:
                k, v = torch.cat([keys[prefix], k], dim=2), torch.cat([values[prefix], v], dim=2)
            outputs.append(attend(module, q, k, v, attention_mask.of(length, k.shape[2]), **options)[0])
        return torch.cat(outputs, dim=1)

    if query.device.type == "cpu" and query.dtype in (torch.bfloat16, torch.float16) and query.requires_grad:
        return _BackwardInFp32.apply(by_sequence, query, key, value), None
    return by_sequence(query, key, value), None


class _BackwardInFp32(torch.autograd.Function):
    """Attention whose backward runs it again in fp32. On a CPU, torch's own backward in bfloat16 takes several times as
    long, and keeps more in memory until then."""

    @staticmethod
    def forward(ctx: Any, attend: Callable[..., Tensor], *states: Tensor) -> Tensor:
        ctx.attend = attend
        ctx.save_for_backward(*states)
        return attend(*states)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            states = [state.detach().float().requires_grad_() for state in ctx.saved_tensors]
            gradients = torch.autograd.grad(ctx.attend(*states), states, upstream.float())
        return None, *(gradient.to(upstream.dtype) for gradient in gradients)
