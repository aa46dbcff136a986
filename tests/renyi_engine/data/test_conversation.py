"""What a message may hold, and the columns beside it: what is wrong is named by row, column and turn."""

from __future__ import annotations

import pytest

from renyi_engine import DpoTask, SftTask

from ..conversations import CHATML, ONE
from ..tokenizers_for_tests import byte_pair_tokenizer


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        ({"role": "user", "content": 7}, "content: expected a string, or a list of .*; got int '7'"),
        ({"role": "user", "content": {"text": "a"}}, "content: expected a string, or a list of .*; got dict"),
        ({"role": "user", "content": [{"type": "image"}]}, "content: expected a string, or a list of .*; got list"),
        ({"role": "user", "content": ["a"]}, "content: expected a string, or a list of .*; got list"),
        ({"role": "user", "content": [{"type": "text", "text": 3}]}, "content: expected a string, or a list of"),
        ({"role": "user", "content": None}, "content: expected a string, or a list of text parts; got NoneType"),
        ({"role": "user"}, "content: expected a string, or a list of text parts; got NoneType"),
        ({"role": "assistant", "content": None, "tool_calls": []}, "content: expected a string, or a list"),
        ({"role": 3, "content": "a"}, "role: expected a string; got int"),
        ({"content": "a"}, "role: expected a string; got NoneType"),
    ],
)  # fmt: skip
def test_content_that_is_no_text_is_refused_by_row_and_turn(message, complaint):
    task = SftTask(byte_pair_tokenizer(CHATML), 512)
    with pytest.raises(ValueError, match=f"row 5: messages: turn 2: {complaint}"):
        task.example(5, {"messages": [*ONE, message]})
    with pytest.raises(ValueError, match=f"row 5: prompt: turn 2: {complaint}"):
        task.example(5, {"prompt": [*ONE, message], "completion": ONE[1:]})
    with pytest.raises(ValueError, match=f"row 5: rejected: turn 1: {complaint}"):
        DpoTask(task.tokenizer, 512, 0.1).example(
            5, {"prompt": ONE[:1], "chosen": ONE[1:], "rejected": [ONE[1], message]}
        )


@pytest.mark.parametrize("calls", [5, True, "clock", ["clock"], {"name": "clock"}])
def test_tool_calls_that_are_no_list_of_calls_are_refused_by_row_and_turn(calls):
    messages = [ONE[0], {"role": "assistant", "content": "", "tool_calls": calls}]
    with pytest.raises(ValueError, match="row 0: messages: turn 1: tool_calls: expected a list of "):
        SftTask(byte_pair_tokenizer(CHATML), 512).example(0, {"messages": messages})


@pytest.mark.parametrize(
    ("context", "complaint"),
    [
        ({"tools": "[{"}, "tools: expected JSON in a string; got '"),
        ({"tools": {"name": "clock"}}, "tools: expected a list; got dict"),
        ({"documents": 3}, "documents: expected a list; got int"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs: expected an object .*; got list"),
        (
            {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
            "chat_template_kwargs: a row cannot set 'chat_template'",
        ),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs: a row cannot set 'messages'"),
        (
            {"chat_template_kwargs": {"add_generation_prompt": True}},
            "chat_template_kwargs: a row cannot set 'add_generation_prompt'",
        ),
    ],
)
def test_a_column_beside_the_messages_that_is_not_what_it_should_be_names_its_row(context, complaint):
    with pytest.raises(ValueError, match=f"row 3: {complaint}"):
        SftTask(byte_pair_tokenizer(CHATML), 512).example(3, {"messages": ONE} | context)
