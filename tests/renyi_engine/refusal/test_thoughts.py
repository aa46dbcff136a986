"""A thought is no part of an answer, however a model marks it."""

from __future__ import annotations

import pytest

from renyi_engine.refusal.judges import DIRECT_ANSWER, DIRECT_REFUSAL, UNPARSED, Exchange, KeywordJudge, parse_answer
from renyi_engine.refusal.thoughts import without_thought

THOUGHT = "I cannot tell yet. I'm sorry, but is it a direct_refusal?"
FORMS = [
    "<think>{}</think>", "\n<think>\n{}\n</think>\n\n", "{}</think>\n", "<thinking>{}</thinking>", "[THINK]{}[/THINK]",
    "<|START_THINKING|>{}<|END_THINKING|>", "<seed:think>{}</seed:think>", "<|channel>thought\n{}<channel|>",
    "<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>", "analysis{}assistantfinal",
    "<think></think>{}</think>",
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_an_answer_is_what_comes_after_the_thought(form):
    text = form.replace("{}", THOUGHT) + "Open the lid."
    assert without_thought(text) == "Open the lid."
    (verdict,) = KeywordJudge()([Exchange("How?", text)])
    assert verdict.label == DIRECT_ANSWER
    (verdict,) = KeywordJudge()([Exchange("How?", form.replace("{}", "Open the lid. ") + "I cannot help.")])
    assert verdict.label == DIRECT_REFUSAL
    assert parse_answer(form.replace("{}", THOUGHT) + "direct_answer") == DIRECT_ANSWER


@pytest.mark.parametrize(
    "start", ["<think>", " <think>\n", "[THINK]", "<|START_THINKING|>", "analysis", "<|channel|>analysis<|message|>"]
)
def test_a_thought_that_does_not_end_is_neither_answer_nor_refusal(start):
    assert without_thought(start + THOUGHT) is None
    (verdict,) = KeywordJudge()([Exchange("How?", start + THOUGHT)])
    assert verdict.label == UNPARSED
    assert parse_answer(start + "direct_answer") == UNPARSED


@pytest.mark.parametrize(
    "text",
    ["Yes.", "", "analysis of the matter", "Analysis: yes", "finally, yes", "I think <b>so</b>", "Use <think> there"],
)
def test_a_text_without_a_thought_stays(text):
    assert without_thought(text) == text
