"""From token sequences to batches: their order by length, and their padding.

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
    """Right-padded input_ids, attention_mask and labels, each [B, T]."""

    def pad(rows: Iterable[list[int]], value: int) -> Tensor:
        return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)

    return {
        "input_ids": pad((e.input_ids for e in examples), pad_token_id),
        "attention_mask": pad(([1] * len(e.input_ids) for e in examples), 0),
        "labels": pad((e.labels for e in examples), IGNORE_INDEX),
    }


def longest_first(lengths: Iterable[int]) -> list[int]:
    """Indices by falling length: batches are of similar length, and what does not fit into memory fails at once."""
    lengths = list(lengths)
    return sorted(range(len(lengths)), key=lambda i: -lengths[i])


def left_padded(prompts: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """(input_ids, attention_mask), each [B, T], of prompts to be continued."""
    width = max(map(len, prompts))
    input_ids = torch.tensor([[pad_token_id] * (width - len(ids)) + list(ids) for ids in prompts])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
    return input_ids, mask


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokenizer's pad token, or else its end-of-sequence token: padding is masked, so either will do."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    raise ValueError(
        "tokenizer: it has neither a pad nor an end-of-sequence token; set tokenizer.pad_token and save it again"
    )
