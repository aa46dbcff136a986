"""Attention of all sequences of a packed row in one call, on a GPU: `torch.nn.attention.varlen`.

It takes plain causal attention in half precision. Everything else is one call a sequence: see `packed_attention`.

Layout: K particles (the rows of the model), N tokens of a packed row, H heads, D size of a head.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
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
        keys: ``[M]``: the tokens whose keys each part sees, one part after the other; None if these are its own tokens.
    """

    ends_q: Tensor
    ends_k: Tensor
    max_q: int
    max_k: int
    keys: Tensor | None


def can_take(query: Tensor, value: Tensor, options: Mapping[str, Any]) -> bool:
    """Whether one call can do this attention, if it is plainly causal."""
    plain = not options.get("dropout") and all(options.get(name) is None for name in _ELSEWHERE)
    return plain and _is_for_the_kernel(query) and _has_right_sizes(query, value)


def _is_for_the_kernel(query: Tensor) -> bool:
    low = query.dtype in (torch.float16, torch.bfloat16)
    return query.is_cuda and low and torch.cuda.get_device_capability(query.device) >= (8, 0)


def _has_right_sizes(query: Tensor, value: Tensor) -> bool:
    """Whether heads are of a size that the kernel takes. Some models have values of another size than keys."""
    D = query.shape[-1]
    return D <= 256 and D % 8 == 0 and value.shape[-1] == D


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

    def put(numbers: list[int], dtype: torch.dtype) -> Tensor:
        # from other memory than pinned one, a GPU may copy only when it has done everything before
        return torch.tensor(numbers, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)

    def ends(sizes: Sequence[int]) -> Tensor:
        all_ends = [0, *itertools.accumulate(itertools.chain(*itertools.repeat(sizes, num_particles)))]
        return put(all_ends, torch.int32)

    of_keys = put(keys, torch.int64) if shared else None
    return Row(ends(lengths), ends(num_keys), max(lengths), max(num_keys), of_keys)


def attend(query: Tensor, key: Tensor, value: Tensor, row: Row, scaling: float | None) -> Tensor:
    """Attention [K, N, H, D] of query [K, H, N, D], key and value [K, H or fewer, N, D]."""
    K, H, N, _ = query.shape
    q, k, v = (states.transpose(1, 2) for states in (query, key, value))
    if row.keys is not None:
        k, v = k.index_select(1, row.keys), v.index_select(1, row.keys)
    if k.shape[2] != H:
        k, v = (states.repeat_interleave(H // states.shape[2], dim=2) for states in (k, v))
    q, k, v = (states.flatten(0, 1) for states in (q, k, v))
    # causal: the last query of a part sees all of its keys, as kernels of flash attention have it
    out = varlen_attn(q, k, v, row.ends_q, row.ends_k, row.max_q, row.max_k, scale=scaling, window_size=(-1, 0))
    assert isinstance(out, Tensor)
    return out.unflatten(0, (K, N))
