"""Which tokens are learnt."""

from __future__ import annotations

import copy

import pytest

from renyi_engine.data.examples import Dropped
from renyi_engine.objectives.sft import SftTask

from ..conversations import chat


@pytest.fixture
def task(tokenizer):
    return SftTask(tokenizer, max_length=64)


def learnt(task, row):
    """(the whole text, the text that carries labels) of a row."""
    example = task.example(0, row)
    decode = task.tokenizer.decode
    assert all(label in (-100, token) for label, token in zip(example.labels, example.input_ids, strict=True))
    return decode(example.input_ids), decode([label for label in example.labels if label != -100])


def test_of_a_plain_text_everything_is_learnt_and_it_is_ended(task):
    assert learnt(task, {"text": "ab c"}) == ("ab c</s>", "ab c</s>")


def test_of_a_prompt_and_completion_the_completion_is_learnt_and_ended_once(task):
    assert learnt(task, {"prompt": "2+2=", "completion": "4"}) == ("2+2=4</s>", "4</s>")
    assert learnt(task, {"prompt": "2+2=", "completion": "4</s>"}) == ("2+2=4</s>", "4</s>")


def test_of_a_conversational_completion_the_answer_is_learnt_after_its_header(task):
    row = {"prompt": chat(("user", "hi")), "completion": chat(("assistant", "yo"))}
    assert learnt(task, row) == ("<user>hi</s><assistant>yo</s>", "yo</s>")


def test_of_a_chat_every_assistant_turn_is_learnt(task):
    messages = chat(("system", "s"), ("user", "a"), ("assistant", "B"), ("user", "c"), ("assistant", "D"))
    whole, labelled = learnt(task, {"messages": messages})
    assert whole == "<system>s</s><user>a</s><assistant>B</s><user>c</s><assistant>D</s>"
    assert labelled == "B</s>D</s>"


def test_the_end_is_cut_off_at_max_length(tokenizer):
    example = SftTask(tokenizer, max_length=6).example(3, {"prompt": "abcd", "completion": "efgh"})
    assert tokenizer.decode(example.input_ids) == "abcdef"
    assert example.row == 3
    assert example.num_labels == 2
    assert example.num_cut == 3  # g, h and the end
    assert SftTask(tokenizer, max_length=9).example(3, {"prompt": "abcd", "completion": "efgh"}).num_cut == 0


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "x" * 64, "completion": "y"}, "the prompt alone fills max_length"),
        ({"prompt": "x", "completion": ""}, "the completion is empty"),
        ({"prompt": chat(("user", "x")), "completion": []}, "the completion is empty"),
        ({"text": ""}, "the text is empty"),
        ({"messages": chat(("user", "hi"))}, "no token to learn: the assistant has no turn"),
    ],
)
def test_rows_with_nothing_to_learn_are_dropped_with_the_reason(task, row, reason):
    with pytest.raises(Dropped, match=reason):
        task.example(0, row)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": None}, "row 7: text: expected a string; got NoneType"),
        ({"messages": None, "source": "x"}, r"row 7: messages: expected a list of \{role, content\}; got NoneType"),
        ({"prompt": None, "completion": None}, "row 7: completion: expected a string or a list of messages; got None"),
        ({"source": "x"}, "row 7: expected a value in messages, in prompt and completion, or in text"),
        ({"text": 5}, "row 7: text: expected a string; got int '5'"),
        ({"prompt": None, "completion": "x"}, "row 7: prompt: expected a string"),
        ({"prompt": "x", "completion": 3}, "row 7: completion: expected a string or a list of messages; got int '3'"),
        ({"prompt": "x", "completion": chat(("assistant", "y"))}, "row 7: prompt: expected a list of messages"),
        ({"messages": ["hi"]}, r"row 7: messages: expected a list of \{role, content\}; got list"),
        ({"messages": "hi"}, r"row 7: messages: expected a list of \{role, content\}; got str"),
        ({"messages": [{"role": "user"}]}, "row 7: messages: turn 0: content: expected a string"),
        ({"prompt": "x"}, "row 7: expected a value in messages, in prompt and completion, or in text"),
    ],
)
def test_a_field_that_is_not_what_its_column_says_names_its_row(task, row, message):
    with pytest.raises(ValueError, match=message):
        task.example(7, row)


def test_conversational_data_without_a_chat_template_says_what_to_do(tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(ValueError, match="no chat template; use an instruct model"):
        SftTask(bare, 64).example(0, {"messages": chat(("user", "a"), ("assistant", "b"))})


def test_columns_of_no_known_form_get_a_hint(task):
    task.check_columns(["id", "completion", "prompt"], "dataset_name")
    with pytest.raises(ValueError, match=r"dataset_name: expected the columns .*; is 'promt' meant to be 'prompt'\?"):
        task.check_columns(["promt", "completion"], "dataset_name")


def test_a_text_of_one_token_is_dropped_for_what_it_is(tokenizer):
    import copy

    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(Dropped, match="no token to learn but the first of all, which nothing predicts"):
        SftTask(endless, 64).example(0, {"text": "a"})
    assert SftTask(endless, 64).example(0, {"text": "ab"}).num_labels == 1
