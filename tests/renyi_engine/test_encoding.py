"""From text and chat to tokens."""

from __future__ import annotations

import copy

from renyi_engine.data import left_padded
from renyi_engine.encoding import encode_prompts


def test_prompts_are_the_users_turn_if_there_is_a_template_and_plain_text_if_not(tokenizer):
    encoded = encode_prompts(tokenizer, ["Hi", "Hello"])
    assert [tokenizer.decode(ids) for ids in encoded] == ["<user>Hi</s><assistant>", "<user>Hello</s><assistant>"]
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    assert [bare.decode(ids) for ids in encode_prompts(bare, ["Hi", "Hello"])] == ["Hi", "Hello"]


def test_prompts_to_be_continued_are_padded_on_the_left():
    prompts = [[5, 6], [7, 8, 9]]
    input_ids, mask = left_padded(prompts, 3)
    assert input_ids.tolist() == [[3, 5, 6], [7, 8, 9]]
    assert mask.tolist() == [[0, 1, 1], [1, 1, 1]]
