"""A conversation as one string: what the template is given, and how it ends a turn."""

from __future__ import annotations

import json

import pytest

from renyi_engine import DpoTask, SftTask
from renyi_engine.data.chat_template import ChatTemplate
from renyi_engine.data.examples import tokenize

from ..conversations import CHATML, ONE, PLAIN, SYSTEM_LAST, TWO, chat
from ..tokenizers_for_tests import byte_pair_tokenizer
from .test_turns import CLOCK, TOOLS

ONLY_TEXT = "{% for m in messages %}<|im_start|>{{ m['role'] + '\n' + (m['content'] | string) }}<|im_end|>{% endfor %}"
ONLY_PARTS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for part in m['content'] %}{% if part['type'] == 'text' %}"
    "{{ part['text'] | trim }}{% endif %}{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONTEXT = {
    "tools": [CLOCK],
    "documents": [{"title": "t", "text": "Noon is at 12."}],
    "chat_template_kwargs": {"mood": "sober"},
}


def test_rows_that_a_template_refuses_are_counted_and_the_others_kept():
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
