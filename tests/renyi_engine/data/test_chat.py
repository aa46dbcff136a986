"""Which part of a conversation is learnt, whatever its template does; and what a message may hold."""

from __future__ import annotations

import json

import pytest

from renyi_engine import DpoTask, SftTask
from renyi_engine.data.chat import ChatTemplate
from renyi_engine.data.examples import Dropped

from ..tokenizers_for_tests import byte_pair_tokenizer, learnt

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe of help.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# shows the system text before the last turn of the user only
SYSTEM_LAST = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST]"
    "{% if messages[0]['role'] == 'system' and m == (messages | selectattr('role', 'equalto', 'user') | list)[-1] %}"
    "{{ messages[0]['content'] }}\n\n{% endif %}{{ m['content'] }}[/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
)
PLAIN = (
    "{% for m in messages %}{{ m['role'] | capitalize }}: {{ m['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant: {% endif %}"
)
ONLY_TEXT = "{% for m in messages %}<|im_start|>{{ m['role'] + '\n' + (m['content'] | string) }}<|im_end|>{% endfor %}"
ONLY_PARTS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for part in m['content'] %}{% if part['type'] == 'text' %}"
    "{{ part['text'] | trim }}{% endif %}{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat(*turns):
    return [{"role": role, "content": content} for role, content in turns]


def learnt_of(tokenizer, row, max_length=512):
    example = SftTask(tokenizer, max_length).example(0, row)
    return learnt(tokenizer, example.input_ids, example.labels)


ONE = chat(("user", "What is red?"), ("assistant", "Rouge"))
TWO = [*ONE, *chat(("user", "My card is 4421. What is blue?"), ("assistant", "Bleu"))]


# ---------------------------------------------------------------------- a prompt that is no prefix


def test_a_prompt_that_the_template_writes_in_another_way_is_refused_in_both_tasks():
    tokenizer = byte_pair_tokenizer(SYSTEM_LAST)
    system = chat(("system", "Be brief."))
    # the system text stands before the first question in the prompt alone, and before the second one in the whole
    row = {"prompt": system + TWO[:1], "completion": TWO[1:]}
    reason = "writes the conversation before the answer in another way once the answer follows"
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
    with pytest.raises(Dropped, match="does not begin with the assistant's turn"):
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


def test_rows_that_a_template_refuses_are_counted_and_the_others_kept():
    from renyi_engine.data.examples import tokenize

    alternate = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system please') }}{% endif %}" + CHATML
    task = SftTask(byte_pair_tokenizer(alternate), 512)
    rows = [{"messages": ONE}, {"messages": [*chat(("system", "s")), *ONE]}]
    examples, dropped = tokenize(rows, task.example, "dataset_name")
    assert [example.row for example in examples] == [0]
    assert dropped == {"the chat template refuses the messages (No system please)": [1]}
    with pytest.raises(ValueError, match=r"no row is left to use \(1 rows dropped \(0\): the chat template refuses"):
        tokenize(rows[1:], task.example, "dataset_name")


def test_the_token_that_ends_a_turn_is_the_templates_own():
    for template, token in ((CHATML, "<|im_end|>"), (SYSTEM_LAST, "</s>"), (PLAIN, None), (None, None)):
        tokenizer = byte_pair_tokenizer(template)
        expected = None if token is None else tokenizer.convert_tokens_to_ids(token)
        assert ChatTemplate(tokenizer).end_of_turn() == expected


# ---------------------------------------------------------------------- content


@pytest.mark.parametrize("template", [ONLY_TEXT, ONLY_PARTS], ids=["text", "parts"])
def test_text_and_text_parts_come_out_the_same_whichever_the_template_takes(template):
    tokenizer = byte_pair_tokenizer(template)
    halves = [(m["role"], (m["content"][:2], m["content"][2:])) for m in TWO]
    parts = [{"role": role, "content": [{"type": "text", "text": half} for half in both]} for role, both in halves]
    rows = [{"messages": TWO}, {"messages": parts}]
    plain, in_parts = (SftTask(tokenizer, 512).example(0, row) for row in rows)
    text = tokenizer.decode(plain.input_ids)
    assert "What is red?" in text
    assert "Bleu" in text
    assert "type" not in text
    if template is ONLY_TEXT:
        assert plain == in_parts
    else:
        # its author trims every part
        assert tokenizer.decode(in_parts.input_ids) == text.replace("My card", "Mycard")


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


# ---------------------------------------------------------------------- tools and other columns

TOOLS = (
    "{% if tools %}TOOLS {{ tools | tojson }}\n{% endif %}{% if documents %}DOCUMENTS {{ documents[0]['text'] }}\n"
    "{% endif %}{% if mood is defined %}MOOD {{ mood }}\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% for call in m['tool_calls'] or [] %}<tool_call>{{ call['function'] | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"zone": "string"}}}
CONTEXT = {
    "tools": [CLOCK],
    "documents": [{"title": "t", "text": "Noon is at 12."}],
    "chat_template_kwargs": {"mood": "sober"},
}


@pytest.mark.parametrize("as_json", [False, True])
def test_the_template_is_given_tools_documents_and_its_variables_in_every_form(as_json):
    tokenizer = byte_pair_tokenizer(TOOLS)
    context = {name: json.dumps(value) if as_json else value for name, value in CONTEXT.items()}
    rows = [{"messages": ONE}, {"prompt": ONE[:1], "completion": ONE[1:]}]
    texts = [tokenizer.decode(SftTask(tokenizer, 512).example(0, row | context).input_ids) for row in rows]
    pair = {"prompt": ONE[:1], "chosen": ONE[1:], "rejected": chat(("assistant", "Vert"))} | context
    texts += [tokenizer.decode(s.input_ids) for s in DpoTask(tokenizer, 512, 0.1).example(0, pair).sequences]
    for text in texts:
        assert text.startswith("TOOLS [{")
        assert '"clock"' in text
        assert "DOCUMENTS Noon is at 12.\n" in text
        assert "MOOD sober\n" in text
    expected = tokenizer.apply_chat_template(ONE, tools=[CLOCK], documents=CONTEXT["documents"], mood="sober")
    assert SftTask(tokenizer, 512).example(0, rows[0] | context).input_ids == expected["input_ids"]


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


@pytest.mark.parametrize("calls", [5, True, "clock", ["clock"], {"name": "clock"}])
def test_tool_calls_that_are_no_list_of_calls_are_refused_by_row_and_turn(calls):
    messages = [ONE[0], {"role": "assistant", "content": "", "tool_calls": calls}]
    with pytest.raises(ValueError, match="row 0: messages: turn 1: tool_calls: expected a list of "):
        SftTask(byte_pair_tokenizer(TOOLS), 512).example(0, {"messages": messages})


def test_marks_that_hold_nothing_are_the_reason():
    marked = (
        "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'narrator' %}{% generation %}x{% endgeneration %}"
    )
    template = marked + "{% endif %}<|im_end|>{% endfor %}"
    with pytest.raises(Dropped, match="the chat template marks nothing in it with "):
        SftTask(byte_pair_tokenizer(template), 64).example(0, {"messages": ONE})


@pytest.mark.parametrize(
    ("context", "complaint"),
    [
        ({"tools": "[{"}, "row 3: tools: a string that is not JSON"),
        ({"tools": {"name": "clock"}}, "row 3: tools: expected a list; got dict"),
        ({"documents": 3}, "row 3: documents: expected a list; got int"),
        ({"chat_template_kwargs": [1]}, "row 3: chat_template_kwargs: expected names and values; got list"),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "'chat_template' cannot be set from a row"),
        ({"chat_template_kwargs": {"messages": []}}, "'messages' cannot be set from a row"),
        ({"chat_template_kwargs": {"add_generation_prompt": True}}, "'add_generation_prompt' cannot be set from a row"),
    ],
)
def test_a_column_beside_the_messages_that_is_not_what_it_should_be_names_its_row(context, complaint):
    with pytest.raises(ValueError, match=complaint):
        SftTask(byte_pair_tokenizer(TOOLS), 512).example(3, {"messages": ONE} | context)


def test_columns_that_are_not_read_are_named_once(tokenizer):
    columns = ["messages", "tools", "documents", "chat_template_kwargs", "system", "source"]
    with pytest.warns(UserWarning, match="dataset_name: these columns are not read: system, source") as caught:
        SftTask(tokenizer, 64).check_columns(columns, "dataset_name")
    assert len(caught) == 1
    with pytest.warns(UserWarning, match="dataset_name: these columns are not read: tools"):
        SftTask(tokenizer, 64).check_columns(["text", "tools"], "dataset_name")
    with pytest.warns(UserWarning, match="dataset_name: these columns are not read: score_chosen"):
        DpoTask(tokenizer, 64, 0.1).check_columns(["chosen", "rejected", "tools", "score_chosen"], "dataset_name")
