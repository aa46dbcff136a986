"""What attention has to know of a packed row, in which several sequences stand one after the other.

Layout: n parts of a row, N tokens, M keys that all parts see together.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor


def attention_of(segments: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
    """Who sees whom in a row of n parts, in two forms: for one call of attention a part, and for one call a row.

    `segments`: of every part, how many tokens it has, and the number of the part whose tokens it sees before its own
    ones, or -1.

    Returns:
        segments: ``[n, 2]``, for the host.
        ends: ``[2, n + 1]`` int32: how many queries, and how many keys, the parts before each part have together; last
            the numbers of all parts.
        keys: ``[M]``: the tokens whose keys each part sees, one part after the other. It is left out if every part sees
            its own tokens alone.
    """
    ends = list(itertools.accumulate((length for length, _ in segments), initial=0))
    seen = [
        [*([prefix] if prefix >= 0 else []), part] for part, (_, prefix) in enumerate(segments)
    ]  # of every part, the parts that it sees
    num_keys = [sum(segments[part][0] for part in parts) for parts in seen]
    found = {
        "segments": torch.tensor(segments).view(-1, 2),
        "ends": torch.tensor([ends, list(itertools.accumulate(num_keys, initial=0))], dtype=torch.int32),
    }
    if any(prefix >= 0 for _, prefix in segments):
        found["keys"] = torch.cat([torch.arange(ends[part], ends[part + 1]) for parts in seen for part in parts])
    return found
