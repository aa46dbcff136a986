"""From token sequences to batches: sorts them by length, and pads them.

Layout: B sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from renyi_engine.data.examples import Example
from renyi_kernels import IGNORE_INDEX


def collate(examples: Sequence[Example], pad_token_id: int) -> dict[str, Tensor]:
    """input_ids, attention_mask and labels, each [B, T], with the padding on the right."""
    return {
        "input_ids": _pad((e.input_ids for e in examples), pad_token_id, "right"),
        "attention_mask": _pad(([1] * len(e.input_ids) for e in examples), 0, "right"),
        "labels": _pad((e.labels for e in examples), IGNORE_INDEX, "right"),
    }


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
