"""From token sequences to batches: sorts them by length, and pads them, or packs them into one row without padding.

Layout: B sequences, T tokens; N tokens of a packed row, L labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from renyi_engine.core import attention_of
from renyi_engine.data.examples import Example
from renyi_engine.data.turns import common_prefix
from renyi_kernels import IGNORE_INDEX


def collate(examples: Sequence[Example], pad_token_id: int) -> dict[str, Tensor]:
    """input_ids, attention_mask and labels, each [B, T], with the padding on the right."""
    return {
        "input_ids": _pad((e.input_ids for e in examples), pad_token_id, "right"),
        "attention_mask": _pad(([1] * len(e.input_ids) for e in examples), 0, "right"),
        "labels": _pad((e.labels for e in examples), IGNORE_INDEX, "right"),
    }


def pack(families: Iterable[Sequence[Example]]) -> dict[str, Tensor]:
    """All sequences of a batch, one after the other in one row. A family is examples that may begin alike: what all of
    them begin with stands in the row once, and each of them goes on from it. Tokens after the last label are left out.

    Returns:
        input_ids, position_ids: ``[1, N]``; positions count from the beginning of each sequence.
        segments, ends, perhaps keys: who sees whom, see `core.packed_rows`. The row is n parts.
        labels: ``[L]``, the labels that count. label_rows: ``[L]``, the places in the row that predict them.
        label_places: ``[B, T]``: of every sequence, in the given order, which of the L labels are its first, second
            and so on; L where it has no more.
    """
    input_ids: list[int] = []
    positions: list[int] = []
    segments: list[tuple[int, int]] = []
    labels: list[int] = []
    label_rows: list[int] = []
    label_places: list[Tensor] = []

    def add(ids: Sequence[int], start: int, prefix: int) -> int:
        """Add a part of the row. Returns the place of its first token."""
        first = len(input_ids)
        if ids:
            segments.append((len(ids), prefix))
            input_ids.extend(ids)
            positions.extend(range(start, start + len(ids)))
        return first

    for family in families:
        reads, shared = _read(family)
        beginning = add(reads[0][:shared], 0, -1)
        prefix = len(segments) - 1 if shared else -1
        for example, read in zip(family, reads, strict=True):
            rest = add(read[shared:], shared, prefix)
            counted = [t for t, label in enumerate(example.labels) if t and label != IGNORE_INDEX]
            label_places.append(torch.arange(len(labels), len(labels) + len(counted)))
            labels.extend(example.labels[t] for t in counted)
            label_rows.extend(beginning + t - 1 if t <= shared else rest + t - 1 - shared for t in counted)
    return {
        "input_ids": torch.tensor([input_ids]),
        "position_ids": torch.tensor([positions]),
        **attention_of(segments),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "label_rows": torch.tensor(label_rows, dtype=torch.int64),
        "label_places": pad_sequence(label_places, batch_first=True, padding_value=len(labels)),
    }


def packed_length(family: Sequence[Example]) -> int:
    """How many tokens a family takes in a packed row."""
    reads, shared = _read(family)
    return shared + sum(len(read) - shared for read in reads)


def _read(family: Sequence[Example]) -> tuple[list[list[int]], int]:
    """(the tokens of each sequence that the model reads, with how many of them all begin alike)."""
    # nobody reads the last token, because it predicts nothing; one is read, as a model needs a token
    ends = [max([1, *(t for t, label in enumerate(e.labels) if label != IGNORE_INDEX)]) for e in family]
    reads = [example.input_ids[:end] for example, end in zip(family, ends, strict=True)]
    return reads, min((common_prefix(reads[0], read) for read in reads[1:]), default=0)


def left_padded(prompts: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """(input_ids, attention_mask), each [B, T], of prompts to be continued: the padding is on the left."""
    return _pad(prompts, pad_token_id, "left"), _pad(([1] * len(ids) for ids in prompts), 0, "left")


def _pad(rows: Iterable[Sequence[int]], value: int, side: str) -> Tensor:
    tensors = [torch.tensor(row, dtype=torch.int64) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)


def longest_first(lengths: Iterable[int]) -> list[int]:
    """The indices from the longest to the shortest. So the sequences of a batch are of similar length, and if one does
    not fit into memory, the first batch shows it."""
    lengths = list(lengths)
    return sorted(range(len(lengths)), key=lambda i: -lengths[i])


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokenizer's pad token, or else its end-of-sequence token. Padding is masked, so either of the two will do."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    raise ValueError(
        "tokenizer: it has neither a pad nor an end-of-sequence token; set tokenizer.pad_token and save it again"
    )
