"""Batches are padded, and what is padded is masked."""

from __future__ import annotations

import pytest

from renyi_engine.data.batches import collate, left_padded, pad_token_id
from renyi_engine.data.examples import Example


def test_collate_pads_on_the_right_and_masks_what_it_pads():
    batch = collate([Example(0, [5, 6, 7], [-100, 6, 7]), Example(1, [8], [8])], pad_token_id=9)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]


def test_prompts_to_be_continued_are_padded_on_the_left():
    prompts = [[5, 6], [7, 8, 9]]
    input_ids, mask = left_padded(prompts, 3)
    assert input_ids.tolist() == [[3, 5, 6], [7, 8, 9]]
    assert mask.tolist() == [[0, 1, 1], [1, 1, 1]]


def test_padding_falls_back_to_eos_and_then_gives_up():
    class Tokenizer:
        pad_token_id, eos_token_id = None, 0

    tokenizer = Tokenizer()
    assert pad_token_id(tokenizer) == 0
    tokenizer.eos_token_id = None
    with pytest.raises(ValueError, match="neither a pad nor an end-of-sequence token"):
        pad_token_id(tokenizer)
