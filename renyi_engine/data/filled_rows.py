"""Packed rows that are filled up, so that many of them have the same sizes.

What a GPU does for one packed row can be recorded, and repeated for another row of the same sizes. So a few sizes are
chosen, and every row is filled up to the smallest that it fits into.

Layout: n parts of a row, N tokens, M keys, L labels, B sequences, T labels of one sequence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

_MULTIPLE = 64
"""Rows are filled up to a multiple of so many tokens: products of whole tiles are faster."""


class RowSizes(NamedTuple):
    """The sizes of a packed row.

    Attributes:
        sequences: B. tokens: N. parts: n. keys: M, or 0 if every part sees its own tokens alone.
        labels: L. labels_of_one: T.
        longest: the most tokens of a part. longest_keys: the most tokens that a part sees.
    """

    sequences: int
    tokens: int
    parts: int
    keys: int
    labels: int
    labels_of_one: int
    longest: int
    longest_keys: int

    @classmethod
    def of(cls, row: Mapping[str, Tensor]) -> RowSizes:
        """Those of a row that `pack` made."""
        sequences, labels_of_one = row["label_places"].shape
        longest, longest_keys = row["ends"].diff(dim=1).amax(dim=1).tolist()
        tokens, parts, labels = row["input_ids"].shape[1], len(row["segments"]), len(row["labels"])
        keys = len(row["keys"]) if "keys" in row else 0
        return cls(sequences, tokens, parts, keys, labels, labels_of_one, longest, longest_keys)

    @classmethod
    def together(cls, rows: Sequence[RowSizes]) -> RowSizes:
        """The sizes of these rows one after the other, as one row."""
        sums, largest = cls(*map(sum, zip(*rows, strict=True))), cls(*map(max, zip(*rows, strict=True)))
        return sums._replace(
            keys=sum(row.keys or row.tokens for row in rows) if sums.keys else 0,
            labels_of_one=largest.labels_of_one,
            longest=largest.longest,
            longest_keys=largest.longest_keys,
        )

    def hold(self, row: RowSizes) -> bool:
        """Whether a row can be filled up to these sizes."""
        if row.sequences != self.sequences or row.tokens > self.tokens or (row.keys and not self.keys):
            return False
        return all(size <= largest for size, largest in zip(self._filled(row), self, strict=True))

    def _filled(self, row: RowSizes) -> RowSizes:
        """The sizes of the row after it was filled up to as many tokens as these sizes have."""
        left = self.tokens - row.tokens
        parts = row.parts + -(-left // self.longest)
        if not self.keys:
            return row._replace(tokens=row.tokens + left, parts=parts)
        # one part more is for keys that no token sees
        return row._replace(tokens=row.tokens + left, parts=parts + 1, keys=(row.keys or row.tokens) + left)


class Filler:
    """Fills up rows to a few sizes, which are chosen for the rows that are known beforehand. A row that does not fit
    into them is left as it is.

    The first row gets the largest sizes. So if something is made for each of the sizes, and it does not fit into
    memory, the first one shows it, and the others can use what memory the first one has taken.
    """

    def __init__(self, rows: Iterable[RowSizes]) -> None:
        self.sizes = choose_sizes(rows)
        self._is_first = True

    def __call__(self, row: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        own = RowSizes.of(row)
        fitting = [sizes for sizes in self.sizes if sizes.hold(own)]
        if not fitting:
            return row
        sizes = fitting[-1 if self._is_first else 0]
        self._is_first = False
        return fill(row, sizes)


def choose_sizes(rows: Iterable[RowSizes], most: int = 6) -> list[RowSizes]:
    """At most so many sizes, from the smallest to the largest, to which these rows can be filled up with the least
    filling. Rows with an unusual number of sequences are left out, such as the last one of an epoch."""
    rows = sorted(rows, key=lambda row: row.tokens)
    if not rows:
        return []
    ((usual, _),) = Counter(row.sequences for row in rows).most_common(1)
    rows = [row for row in rows if row.sequences == usual]
    largest = RowSizes(*map(max, zip(*rows, strict=True)))
    found = []
    for end in _ends([row.tokens for row in rows], most):
        sizes = RowSizes(*map(max, zip(*rows[:end], strict=True)))
        sizes = sizes._replace(
            tokens=-(-sizes.tokens // _MULTIPLE) * _MULTIPLE,
            keys=largest.keys,
            longest=largest.longest,
            longest_keys=largest.longest_keys,
        )
        filled = RowSizes(*map(max, zip(*map(sizes._filled, rows[:end]), strict=True)))
        found.append(sizes._replace(parts=filled.parts, keys=filled.keys))
    return found


def fill(row: Mapping[str, Tensor], sizes: RowSizes) -> dict[str, Tensor]:
    """A row that `pack` made, filled up. The filling is sequences of their own, without labels, so no other sequence
    changes by it.

    Beside what `pack` gives, there is ``longest`` [2], for the host: `sizes.longest` and `sizes.longest_keys`.

    Raises:
        ValueError: the row does not fit into these sizes.
    """
    own = RowSizes.of(row)
    if not sizes.hold(own):
        raise ValueError(f"sizes: expected sizes that hold a row of {own}; got {sizes}")
    left = sizes.tokens - own.tokens
    filling = [min(sizes.longest, left - start) for start in range(0, left, sizes.longest)]
    lengths = torch.tensor(filling + [0] * (sizes.parts - own.parts - len(filling)))
    ends = torch.cat([row["ends"], row["ends"][:, -1:] + lengths.cumsum(0)], dim=1).int()
    positions = torch.cat([torch.arange(0), *map(torch.arange, filling)])
    places = row["label_places"]
    places = places.where(places < own.labels, sizes.labels)
    filled = {
        **row,
        "input_ids": pad(row["input_ids"], (0, left), value=int(row["input_ids"][0, 0])),
        "position_ids": torch.cat([row["position_ids"], positions[None]], dim=1),
        "segments": torch.cat([row["segments"], torch.stack([lengths, torch.full_like(lengths, -1)], dim=1)]),
        "ends": ends,
        # nothing is summed up of these labels, whatever their log-probabilities are
        "labels": pad(row["labels"], (0, sizes.labels - own.labels)),
        "label_rows": pad(row["label_rows"], (0, sizes.labels - own.labels)),
        "label_places": pad(places, (0, sizes.labels_of_one - own.labels_of_one), value=sizes.labels),
        "longest": torch.tensor([sizes.longest, sizes.longest_keys]),
    }
    if sizes.keys:
        keys = row["keys"] if "keys" in row else torch.arange(own.tokens)
        keys = torch.cat([keys, torch.arange(own.tokens, sizes.tokens)])
        filled["keys"] = pad(keys, (0, sizes.keys - len(keys)), value=-1)
        ends[1, -1] = sizes.keys
    return filled


def _ends(tokens: Sequence[int], most: int) -> list[int]:
    """Where the parts end into which these sorted numbers are cut, at most so many. Every number is filled up to the
    last one of its part, and the sum of the filling is the smallest that there can be."""
    sizes, count = np.array(tokens), len(tokens)
    # least[j]: the sum of the first j numbers, each filled up; the cuts say where their last part begins
    least, cuts = np.where(np.arange(count + 1) == 0, 0.0, np.inf), []
    for _ in range(min(most, count)):
        sums = [least[:j] + sizes[j - 1] * np.arange(j, 0, -1) for j in range(1, count + 1)]
        cuts.append([0, *(int(each.argmin()) for each in sums)])
        least = np.array([0.0, *(each.min() for each in sums)])
    ends = [count]
    for cut in reversed(cuts):
        ends.append(cut[ends[-1]])
    return sorted({end for end in ends if end > 0})
