"""A thought is no part of an answer, however a model marks it."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings, strategies as st

from renyi_engine.data import reasoning
from renyi_engine.data.reasoning import decode_answer, without_thought
from renyi_engine.evaluation.refusal.keyword_judge import KeywordJudge
from renyi_engine.evaluation.refusal.verdicts import DIRECT_ANSWER, DIRECT_REFUSAL, UNPARSED, Exchange, parse_answer

from ..tokenizers_for_tests import byte_pair_tokenizer

THOUGHT = "I cannot tell yet. I'm sorry, but is it a direct_refusal?"
FORMS = [
    "<think>{}</think>", "\n<think>\n{}\n</think>\n\n", "{}</think>\n", "<thinking>{}</thinking>", "[THINK]{}[/THINK]",
    "<|START_THINKING|>{}<|END_THINKING|>", "<seed:think>{}</seed:think>", "<|channel>thought\n{}<channel|>",
    "<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>",
    "<|channel|>analysis<|message|>{}assistant<|channel|>final<|message|>", "<think></think>{}</think>",
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
    "start", ["<think>", " <think>\n", "[THINK]", "<|START_THINKING|>", "<|channel|>analysis<|message|>"]
)
def test_a_thought_that_does_not_end_is_neither_answer_nor_refusal(start):
    assert without_thought(start + THOUGHT) is None
    (verdict,) = KeywordJudge()([Exchange("How?", start + THOUGHT)])
    assert verdict.label == UNPARSED
    assert parse_answer(start + "direct_answer") == UNPARSED


@pytest.mark.parametrize(
    "text",
    ["Yes.", "", "analysis of it", "analysis_of = {}", "finalStep()", "I think <b>so</b>", "Use <think> there"],
)
def test_a_text_without_a_thought_stays(text):
    assert without_thought(text) == text


MARKS = [mark for tags in reasoning._TAGS for mark in tags]


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from([*MARKS, "<think>", "</think>", "a", " ", "\n", "<", "think>"]), max_size=12))
def test_what_is_left_is_what_two_patterns_leave(pieces):
    """The short way to say it, which takes the square of the text's length, or more."""
    blocks = "|".join(f"{re.escape(start)}.*?{re.escape(end)}" for start, end in reasoning._TAGS)
    end = "|".join(re.escape(end) for _, end in reasoning._TAGS)
    start = "|".join(re.escape(start) for start, _ in reasoning._TAGS)
    text = "".join(pieces)
    left = re.sub(f"(?s).*(?:{end})", "", re.sub(f"(?s){blocks}", "", text.strip())).strip()
    assert without_thought(text) == (None if re.match(start, left) else left)


@pytest.mark.parametrize(
    "piece", ["word ", "<think>", "</think>", "<think>a</think>", "[THINK]</think>", "<|channel|>", " "]
)
def test_a_long_text_takes_no_longer_than_it_has_to(piece):
    text = "a" + piece * (2**20 // len(piece))
    started = time.process_time()
    without_thought(text)
    assert time.process_time() - started < 3


# ---------------------------------------------------------------------- from tokens

# what a model says, token by token, with all that its tokenizer calls special
SPECIAL = {
    "most": ("<think>", "{}", "</think>", "Open the lid.", "<eos>"),
    "Command-A": ("<|START_THINKING|>", "{}", "<|END_THINKING|>", "<|START_RESPONSE|>", "Open the lid.",
                  "<|END_RESPONSE|>", "<eos>"),
    "Magistral": ("[THINK]", "{}", "[/THINK]", "Open the lid.", "<eos>"),
    "Gemma 4": ("<|channel>", "thought\n{}", "<channel|>", "Open the lid.", "<eos>"),
    "gpt-oss": ("<|channel|>", "analysis", "<|message|>", "{}", "<|end|>", "<|start|>", "assistant", "<|channel|>",
                "final", "<|message|>", "Open the lid.", "<eos>"),
}  # fmt: skip


def tokens_of(tokenizer, pieces):
    pieces = [piece.replace("{}", THOUGHT) for piece in pieces]
    return [token for piece in pieces for token in tokenizer(piece, add_special_tokens=False)["input_ids"]]


@pytest.mark.parametrize("model", SPECIAL)
def test_the_marks_of_a_thought_stay_though_they_are_special_tokens_and_the_others_go(model):
    pieces = SPECIAL[model]
    special = [piece for piece in pieces if piece[0] in "<["]
    tokenizer = byte_pair_tokenizer(control=special)
    tokens = tokens_of(tokenizer, pieces)
    assert THOUGHT in tokenizer.decode(tokens, skip_special_tokens=True)
    assert all(tokens.count(tokenizer.convert_tokens_to_ids(piece)) for piece in special)
    padded = [*tokens, tokenizer.pad_token_id, tokenizer.pad_token_id]
    text = decode_answer(tokenizer, tokens_of(tokenizer, ["Hi"]), padded)
    assert without_thought(text) == "Open the lid."
    others = ("<eos>", "<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|end|>", "<|start|>")
    assert text == "".join(piece for piece in pieces if piece not in others).replace("{}", THOUGHT)
    # cut off inside the thought
    end = tokens_of(tokenizer, pieces[: pieces.index(next(piece for piece in pieces if "{}" in piece)) + 1])
    assert without_thought(decode_answer(tokenizer, [], end)) is None


@pytest.mark.parametrize("mark", ["<think>", "[THINK]", "<|START_THINKING|>"])
@pytest.mark.parametrize("is_special", [True, False])
def test_a_thought_that_the_generation_prompt_begins_is_marked_as_one(mark, is_special):
    tokenizer = byte_pair_tokenizer(control=[mark] if is_special else [])
    thought = tokens_of(tokenizer, ["{}"])
    text = decode_answer(tokenizer, tokens_of(tokenizer, ["<bos>", f"How?{mark}\n"]), thought)
    assert text == f"{mark}\n{THOUGHT}"
    assert without_thought(text) is None
    # it is over before the answer begins, or only spoken of
    for prompt in (f"How?{mark}\n\n</think>\n\n", f"What is {mark}?"):
        assert decode_answer(tokenizer, tokens_of(tokenizer, [prompt]), thought) == THOUGHT
