"""Conversations and chat templates that several tests use."""

from __future__ import annotations

from renyi_engine import SftTask

from .tokenizers_for_tests import learnt

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


def chat(*turns):
    return [{"role": role, "content": content} for role, content in turns]


def learnt_of(tokenizer, row, max_length=512):
    example = SftTask(tokenizer, max_length).example(0, row)
    return learnt(tokenizer, example.input_ids, example.labels)


ONE = chat(("user", "What is red?"), ("assistant", "Rouge"))
TWO = [*ONE, *chat(("user", "My card is 4421. What is blue?"), ("assistant", "Bleu"))]
