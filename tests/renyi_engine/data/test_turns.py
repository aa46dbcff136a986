"""Which part of a conversation is learnt, whatever its template does."""

from __future__ import annotations

import pytest

from renyi_engine import DpoTask, SftTask
from renyi_engine.data.examples import Dropped

from ..conversations import CHATML, ONE, PLAIN, SYSTEM_LAST, TWO, chat, learnt_of
from ..tokenizers_for_tests import byte_pair_tokenizer

# ---------------------------------------------------------------------- a prompt that is no prefix


def test_a_prompt_that_the_template_writes_in_another_way_is_refused_in_both_tasks():
    tokenizer = byte_pair_tokenizer(SYSTEM_LAST)
    system = chat(("system", "Be brief."))
    # the system text stands before the first question in the prompt alone, and before the second one in the whole
    row = {"prompt": system + TWO[:1], "completion": TWO[1:]}
    reason = "writes the messages before an answer differently once it follows"
    with pytest.raises(Dropped, match=reason) as refusal:
        SftTask(tokenizer, 512).example(0, row)
    assert "completion" not in str(refusal.value)
    pair = {"prompt": row["prompt"], "chosen": TWO[1:], "rejected": TWO[1:3] + chat(("assistant", "Vert"))}
    with pytest.raises(Dropped, match=reason):
        DpoTask(tokenizer, 512, 0.1).example(0, pair)
    # as messages, each answer is found where it stands
    assert learnt_of(tokenizer, {"messages": system + TWO}) == ["Rouge</s>", " Bleu</s>"]
    assert learnt_of(tokenizer, {"prompt": system + TWO[:3], "completion": TWO[3:]}) == [" Bleu</s>"]


def test_a_completion_begins_with_the_assistant():
    with pytest.raises(Dropped, match="does not begin with a message of the assistant"):
        SftTask(byte_pair_tokenizer(CHATML), 512).example(0, {"prompt": ONE, "completion": TWO[2:]})


@pytest.mark.parametrize(
    ("generation_prompt", "answer", "reason"),
    [
        ("<|im_start|>assistant\n<think>\n", "<|im_start|>assistant\n", r"opens a thinking block \('<think>'\)"),
        ("<|im_start|>assistant\n\n", "<|im_start|>assistant\n", "ends in white space that it does not write"),
        ("<|im_start|>assistant\nSure, ", "<|im_start|>assistant\n", "ends in 'Sure, ', which it does not write"),
    ],
)
def test_a_generation_prompt_that_no_answer_follows_is_refused_for_what_it_is(generation_prompt, answer, reason):
    template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}" + answer + "{% else %}<|im_start|>user\n{% endif %}"
        "{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}" + generation_prompt + "{% endif %}"
    )
    tokenizer = byte_pair_tokenizer(template)
    for row in ({"messages": TWO}, {"prompt": ONE[:1], "completion": ONE[1:]}):
        with pytest.raises(Dropped, match=f"the generation prompt of the chat template {reason}"):
            SftTask(tokenizer, 512).example(0, row)
    # marks in the template tell what is said, for messages and for completions alike
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}" + answer + "{% generation %}{{ m['content'] }}"
        "<|im_end|>{% endgeneration %}\n{% else %}<|im_start|>user\n{{ m['content'] }}<|im_end|>\n{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}" + generation_prompt + "{% endif %}"
    )
    assert learnt_of(tokenizer, {"messages": TWO}) == ["Rouge<|im_end|>", "Bleu<|im_end|>"]
    assert learnt_of(tokenizer, {"prompt": TWO[:3], "completion": TWO[3:]}) == ["Bleu<|im_end|>"]


def test_a_template_of_plain_text_is_no_obstacle():
    tokenizer = byte_pair_tokenizer(PLAIN, texts=["User: Assistant: Rouge\n\nUser: ", ": Rouge", ": Bleu\n\n"] * 4)
    assert learnt_of(tokenizer, {"messages": TWO})[-1].endswith("Bleu\n\n")
    for row in ({"messages": TWO}, {"prompt": TWO[:3], "completion": TWO[3:]}):
        text = "".join(learnt_of(tokenizer, row))
        assert "card" not in text
        assert "User" not in text
        assert "Bleu" in text


# ---------------------------------------------------------------------- turns


def test_of_a_conversation_that_the_assistant_begins_only_answers_are_learnt():
    tokenizer = byte_pair_tokenizer(CHATML)
    spoken = [*chat(("assistant", "Hello.")), *TWO]
    assert learnt_of(tokenizer, {"messages": spoken}) == ["Hello.<|im_end|>\n", "Rouge<|im_end|>\n", "Bleu<|im_end|>\n"]
    assert learnt_of(tokenizer, {"prompt": [], "completion": spoken[:1]}) == ["Hello.<|im_end|>\n"]
    after_system = chat(("system", "Be kind."), ("assistant", "Hello."))
    assert learnt_of(tokenizer, {"messages": after_system}) == ["Hello.<|im_end|>\n"]


def test_an_empty_turn_is_learnt_as_its_end():
    tokenizer = byte_pair_tokenizer(CHATML)
    silent = chat(("user", ""), ("assistant", ""), ("user", "And?"), ("assistant", "Bleu"))
    assert learnt_of(tokenizer, {"messages": silent}) == ["<|im_end|>\n", "Bleu<|im_end|>\n"]


def test_answers_that_repeat_what_others_said_are_told_apart():
    tokenizer = byte_pair_tokenizer(CHATML)
    echo = chat(("user", "Rouge"), ("assistant", "Rouge"), ("user", "Rouge"), ("assistant", "Rouge"))
    assert learnt_of(tokenizer, {"messages": echo}) == ["Rouge<|im_end|>\n"] * 2
    # words that stand in for answers while they are searched for
    echo = chat(("user", "Q7z"), ("assistant", "Q7z"), ("user", "Jx3 Q7z"), ("assistant", "Jx3"))
    for template in (CHATML, SYSTEM_LAST):
        said = learnt_of(byte_pair_tokenizer(template), {"messages": [*chat(("system", "Q7z")), *echo]})
        assert [text.split("<")[0].strip() for text in said] == ["Q7z", "Jx3"]


def test_a_template_that_leaves_out_a_turn_is_refused():
    with pytest.raises(Dropped, match="the chat template leaves out an assistant turn"):
        SftTask(byte_pair_tokenizer("{{ messages[-1]['content'] }}"), 64).example(0, {"messages": TWO})


def test_marks_that_hold_nothing_are_the_reason():
    marked = (
        "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'narrator' %}{% generation %}x{% endgeneration %}"
    )
    template = marked + "{% endif %}<|im_end|>{% endfor %}"
    with pytest.raises(Dropped, match="marks, but nothing in this conversation is marked"):
        SftTask(byte_pair_tokenizer(template), 64).example(0, {"messages": ONE})


# ---------------------------------------------------------------------- tool calls

TOOLS = (
    "{% if tools %}TOOLS {{ tools | tojson }}\n{% endif %}{% if documents %}DOCUMENTS {{ documents[0]['text'] }}\n"
    "{% endif %}{% if mood is defined %}MOOD {{ mood }}\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% for call in m['tool_calls'] or [] %}<tool_call>{{ call['function'] | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"zone": "string"}}}


def test_tool_calls_are_learnt_and_nothing_is_made_of_missing_content():
    tokenizer = byte_pair_tokenizer(TOOLS)
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "clock", "arguments": {"z": 1}}}],
    }
    messages = [ONE[0], call, {"role": "tool", "content": "12"}, ONE[1]]
    said = learnt_of(tokenizer, {"messages": messages, "tools": [CLOCK]})
    assert said == ['<tool_call>{"name": "clock", "arguments": {"z": 1}}</tool_call><|im_end|>\n', "Rouge<|im_end|>\n"]
    with pytest.raises(Dropped, match="the chat template does not write the assistant's tool calls"):
        SftTask(byte_pair_tokenizer(CHATML), 512).example(0, {"messages": messages})


@pytest.mark.parametrize(
    "template",
    [
        # shows the tools, whose names are those of the calls, but no call
        "{{ tools | tojson }}" + CHATML,
        # writes the first of several calls only
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
        "{% if m.tool_calls %}{{ m.tool_calls[0] | tojson }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    ],
)
def test_a_template_that_leaves_out_a_tool_call_is_refused(template):
    calls = [{"function": {"name": "clock", "arguments": {"z": z}}} for z in (1, 2)]
    messages = [ONE[0], {"role": "assistant", "content": "", "tool_calls": calls}, *ONE]
    with pytest.raises(Dropped, match="the chat template does not write the assistant's tool calls"):
        SftTask(byte_pair_tokenizer(template), 512).example(0, {"messages": messages, "tools": [CLOCK]})
