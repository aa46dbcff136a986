"""Attention of all sequences of a packed row in one call, on a GPU: `torch.nn.attention.varlen`.

It takes plain causal attention in half precision. Everything else is one call a sequence: see `packed_attention`.

Layout: K particles (the rows of the model), N tokens of a packed row, H heads, D size of a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

_ELSEWHERE = ("softcap", "s_aux", "position_bias", "cache")
"""Options of an attention that it cannot take."""


class Row(NamedTuple):
    """A packed row as `varlen_attn` wants it, for all particles.

    Attributes:
        ends_q, ends_k: ``[n * K + 1]`` int32: where the queries, and the keys, of each part end.
        max_q, max_k: the most queries and keys of a part.
        keys: ``[M]``: the tokens whose keys each part sees, one part after the other, and -1 where there is none; None
            if every part sees its own tokens alone.
    """

    ends_q: Tensor
    ends_k: Tensor
    max_q: int
    max_k: int
    keys: Tensor | None


def is_for_the_kernel(states: Tensor) -> bool:
    """Whether there is a kernel for queries of this type on this device."""
    low = states.dtype in (torch.float16, torch.bfloat16)
    return states.is_cuda and low and torch.cuda.get_device_capability(states.device) >= (8, 0)


def fits(query: Tensor, value: Tensor, options: Mapping[str, Any]) -> bool:
    """Whether the kernel can do this attention, if it is plainly causal."""
    plain = not options.get("dropout") and all(options.get(name) is None for name in _ELSEWHERE)
    return plain and _has_right_sizes(query, value)


def _has_right_sizes(query: Tensor, value: Tensor) -> bool:
    """Whether heads are of a size that the kernel takes. Some models have values of another size than keys."""
    D = query.shape[-1]
    return D <= 256 and D % 8 == 0 and value.shape[-1] == D


def row(
    ends: Tensor,
    keys: Tensor | None,
    longest: tuple[int, int],
    num_tokens: int,
    num_particles: int,
    device: torch.device,
) -> Row:
    """The row of all particles, from that of one: see `core.packed_rows`. `longest`: max_q and max_k. Nothing here asks
    for a value."""
    ends = ends.to(device, non_blocking=True)
    keys = None if keys is None else keys.to(device, non_blocking=True)
    # no arange: by that `packing_trial` knows layers that count the tokens of a row
    particles = torch.ones((num_particles, 1), dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32) - 1

    def of_all(ends: Tensor, num: int) -> Tensor:
        return torch.cat([ends[:1], (particles * num + ends[1:]).flatten()])

    num_keys = num_tokens if keys is None else len(keys)
    return Row(of_all(ends[0], num_tokens), of_all(ends[1], num_keys), *longest, keys)


def attend(query: Tensor, key: Tensor, value: Tensor, row: Row, scaling: float | None) -> Tensor:
    """Attention [K, N, H, D] of query [K, H, N, D], key and value [K, H or fewer, N, D]."""
    K, H, N, _ = query.shape
    q, k, v = (states.transpose(1, 2) for states in (query, key, value))
    if row.keys is not None:
        there, places = (row.keys >= 0)[:, None, None], row.keys.clamp(min=0)
        # the kernel writes no gradient of keys that no part sees, and whatever stands there must not be added
        k, v = (states.index_select(1, places).where(there, 0.0) for states in (k, v))
    if k.shape[2] != H:
        k, v = (states.repeat_interleave(H // states.shape[2], dim=2) for states in (k, v))
    q, k, v = (states.flatten(0, 1) for states in (q, k, v))
    # causal: the last query of a part sees all of its keys, as kernels of flash attention have it
    out = varlen_attn(q, k, v, row.ends_q, row.ends_k, row.max_q, row.max_k, scale=scaling, window_size=(-1, 0))
    assert isinstance(out, Tensor)
    return out.unflatten(0, (K, N))
