"""Attention of all sequences of a packed row in one call, on a GPU: `torch.nn.attention.varlen`.

It takes causal attention in half precision, also of a window. Everything else is one call a sequence: see
`packed_attention`.

Layout: K particles (the rows of the model), N tokens of a packed row, H heads, D size of a head.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # it came with torch 2.10
    varlen_attn = None  # type: ignore[assignment]

_TAKES_WINDOWS = varlen_attn is not None and "window_size" in inspect.signature(varlen_attn).parameters
_ELSEWHERE = ("softcap", "s_aux", "position_bias", "cache")
"""Options of an attention that it cannot take."""


class Row(NamedTuple):
    """A packed row as `varlen_attn` wants it, for all particles.

    Attributes:
        ends_q, ends_k: ``[n * K + 1]`` int32: where the queries, and the keys, of each part end.
        max_q, max_k: the most queries and keys of a part.
        keys: ``[M]``: the tokens whose keys each part sees, one part after the other; None if these are its own tokens.
    """

    ends_q: Tensor
    ends_k: Tensor
    max_q: int
    max_k: int
    keys: Tensor | None


def can_take(query: Tensor, options: Mapping[str, Any]) -> bool:
    """Whether one call can do this attention, if its mask is plainly causal."""
    plain = not options.get("dropout") and all(options.get(name) is None for name in _ELSEWHERE)
    return plain and _is_for_the_kernel(query)


def _is_for_the_kernel(query: Tensor) -> bool:
    low = query.dtype in (torch.float16, torch.bfloat16)
    return varlen_attn is not None and query.is_cuda and low and query.shape[-1] <= 256


def row(segments: Sequence[tuple[int, int]], num_particles: int, device: torch.device) -> Row:
    """`segments`: (number of tokens, number of the part whose keys come before its own, or -1) of each part."""
    starts = [0, *itertools.accumulate(length for length, _ in segments)]
    keys, num_keys = [], []
    for part, (length, prefix) in enumerate(segments):
        seen = list(range(starts[part], starts[part] + length))
        if prefix >= 0:
            seen = [*range(starts[prefix], starts[prefix] + segments[prefix][0]), *seen]
        keys += seen
        num_keys.append(len(seen))
    lengths = [length for length, _ in segments]
    shared = any(prefix >= 0 for _, prefix in segments)

    def ends(sizes: Sequence[int]) -> Tensor:
        all_ends = [0, *itertools.accumulate(itertools.chain(*itertools.repeat(sizes, num_particles)))]
        return torch.tensor(all_ends, dtype=torch.int32).to(device, non_blocking=True)

    of_keys = torch.tensor(keys).to(device, non_blocking=True) if shared else None
    return Row(ends(lengths), ends(num_keys), max(lengths), max(num_keys), of_keys)


def attend(query: Tensor, key: Tensor, value: Tensor, row: Row, options: Mapping[str, Any]) -> Tensor:
    """Attention [K, N, H, D] of query [K, H, N, D], key and value [K, H or fewer, N, D]."""
    K, H, N, _ = query.shape
    if row.keys is not None:
        key, value = key.index_select(2, row.keys), value.index_select(2, row.keys)
    if key.shape[1] != H:
        key, value = (states.repeat_interleave(H // states.shape[1], dim=1) for states in (key, value))
    q, k, v = (states.transpose(1, 2).flatten(0, 1) for states in (query, key, value))
    # the last query of a part sees all of its keys, as kernels of flash attention have it
    # masks have windows in them; flash attention, whose masks are none, has them in its options
    window = options.get("sliding_window")
    before = -1 if window is None or window >= row.max_k else window - 1
    causal = {"window_size": (before, 0)} if before >= 0 or _TAKES_WINDOWS else {"is_causal": True}
    ends = (row.ends_q, row.ends_k, row.max_q, row.max_k)
    out = varlen_attn(q, k, v, *ends, scale=options.get("scaling"), **causal)
    assert isinstance(out, Tensor)
    return out.unflatten(0, (K, N))
