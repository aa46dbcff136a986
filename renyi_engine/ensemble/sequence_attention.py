"""Attention in a packed row as one call a sequence, by the model's own implementation; and the same as one operator.

torch.compile cannot take one call a sequence, as every row has other sequences. So a compiled layer calls an operator,
in which the calls are made as they are uncompiled. An operator is given tensors, numbers and strings alone. The rest,
the layer and the mask, are found by a ticket: a tensor that holds a number. The backward keeps the ticket as it keeps
other tensors. When nobody holds the ticket any more, the layer and the mask are let go.

Layout: K particles (the rows of the model), N tokens of a packed row, H heads, D size of a head.
"""

from __future__ import annotations

import itertools
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class Mask(Protocol):
    """A `PackedMask`."""

    @property
    def segments(self) -> Sequence[tuple[int, int]]: ...
    def of(self, q_length: int, kv_length: int) -> Any: ...


def implementation(attention: str, module: nn.Module) -> Callable[..., Any]:
    """transformers' implementation of this name, for a module that asks for it."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    found: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(attention, eager)
    return found


def attend(
    attention: str,
    module: nn.Module,
    mask: Mask,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    options: Mapping[str, Any],
) -> Tensor:
    """Attention [K, N, H, D] of query, key and value, each [K, H, N, D]."""
    run = _by_sequence(attention, module, mask, options)
    if _is_slow_backward(query) and query.requires_grad:
        out: Tensor = _BackwardInFp32.apply(run, query, key, value)
        return out
    return run(query, key, value)


def _by_sequence(
    attention: str, module: nn.Module, mask: Mask, options: Mapping[str, Any]
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    own = implementation(attention, module)
    # the positions are those of the whole row, by which flash attention would cut a sequence again
    options = {name: value for name, value in options.items() if name != "position_ids"}

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        lengths = [length for length, _ in mask.segments]
        queries, keys, values = (states.split(lengths, dim=2) for states in (query, key, value))
        outputs = []
        for (length, prefix), q, k, v in zip(mask.segments, queries, keys, values, strict=True):
            if prefix >= 0:
                k, v = torch.cat([keys[prefix], k], dim=2), torch.cat([values[prefix], v], dim=2)
            outputs.append(own(module, q, k, v, mask.of(length, k.shape[2]), **options)[0])
        return torch.cat(outputs, dim=1)

    return run


def _is_slow_backward(query: Tensor) -> bool:
    """Whether torch's own backward takes several times as long as one in fp32."""
    return query.device.type == "cpu" and query.dtype in (torch.bfloat16, torch.float16)


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


# ---------------------------------------------------------------------- as an operator

OPTIONS = {"scaling": "float", "sliding_window": "SymInt", "softcap": "float", "is_causal": "bool", "s_aux": "Tensor"}
"""The options of an attention that the operator knows, and their types."""

UNREAD = {"position_ids", "use_cache", "past_key_values", "output_attentions", "output_hidden_states"}
"""Options that no attention within a sequence reads."""

_numbers = itertools.count()
_shown: dict[int, tuple[nn.Module, Mask]] = {}
"""The layer and the mask that a ticket stands for, by its number."""


def ticket(layer: nn.Module, mask: Mask) -> Tensor:
    """A new ticket, for one run of `layer`."""
    number = next(_numbers)
    _shown[number] = layer, mask
    made = torch.tensor([number])
    weakref.finalize(made, _shown.pop, number)
    return made


def attend_in_graph(
    attention: str,
    module: nn.Module,
    ticket: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    options: Mapping[str, Any],
) -> Tensor:
    """The same as `attend`, by the operator. `module` is a part of the layer that the ticket stands for.

    Raises:
        TypeError: `module` asks for something that the operator does not know.
    """
    known = {name: value for name, value in options.items() if value is not None and name not in UNREAD}
    if known.pop("dropout", 0.0) or not all(name in OPTIONS for name in known):
        raise TypeError(f"{type(module).__name__} asks for an attention with unknown options")
    call = [known.get(name) for name in OPTIONS]
    out: Tensor = _forward(query, key, value, ticket, attention, type(module).__qualname__, *call)
    return out


# `owner` is the class of the module that asks; after it stand the values of `OPTIONS`

_CALL = f"Tensor ticket, str attention, str owner, {', '.join(f'{kind}? {name}' for name, kind in OPTIONS.items())}"


def _function(ticket: Tensor, attention: str, owner: str, *options: Any) -> Any:
    """The attention of query, key and value that the ticket stands for."""
    layer, mask = _shown[int(ticket)]
    modules = [module for module in layer.modules() if type(module).__qualname__ == owner]
    if len(modules) != 1:
        raise RuntimeError(f"the layer has {len(modules)} modules of the class {owner}")
    given = {name: value for name, value in zip(OPTIONS, options, strict=True) if value is not None}
    return _by_sequence(attention, modules[0], mask, given)


@torch.library.custom_op(
    "renyi_engine::attend_by_sequence",
    mutates_args=(),
    schema=f"(Tensor query, Tensor key, Tensor value, {_CALL}) -> Tensor",
)
def _forward(query: Tensor, key: Tensor, value: Tensor, *call: Any) -> Tensor:
    out: Tensor = _function(*call)(query, key, value)
    return out


@torch.library.custom_op(
    "renyi_engine::attend_by_sequence_backward",
    mutates_args=(),
    schema=f"(Tensor upstream, Tensor query, Tensor key, Tensor value, {_CALL}) -> (Tensor, Tensor, Tensor)",
)
def _backward(upstream: Tensor, query: Tensor, key: Tensor, value: Tensor, *call: Any) -> tuple[Tensor, ...]:
    states = [query, key, value]
    if _is_slow_backward(query):
        upstream, states = upstream.float(), [state.float() for state in states]
    _, pull_back, *_ = torch.func.vjp(_function(*call), *states)
    return tuple(gradient.to(query.dtype).contiguous() for gradient in pull_back(upstream))


@_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *call: Any) -> Tensor:
    K, H, N, _ = query.shape
    return query.new_empty(K, N, H, value.shape[-1])


@_backward.register_fake
def _(upstream: Tensor, query: Tensor, key: Tensor, value: Tensor, *call: Any) -> tuple[Tensor, ...]:
    return tuple(state.new_empty(state.shape) for state in (query, key, value))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.attention, ctx.owner, scaling, sliding_window, softcap, is_causal, s_aux = inputs
    ctx.numbers = scaling, sliding_window, softcap, is_causal
    ctx.save_for_backward(*tensors, s_aux)


def _differentiate(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, ticket, s_aux = ctx.saved_tensors
    call = ticket, ctx.attention, ctx.owner, *ctx.numbers, s_aux
    return *_backward(upstream, query, key, value, *call), *[None] * len(call)


_forward.register_autograd(_differentiate, setup_context=_keep)
