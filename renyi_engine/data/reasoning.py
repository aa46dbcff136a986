"""Separates a model's answer from its thoughts: many models write down what they think before they answer."""

from __future__ import annotations

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

# the marks of a thought's beginning and end: of most models; of some; Magistral; Command-A; Seed-OSS; Kimi; Gemma 4
_TAGS = (
    ("<think>", "</think>"), ("<thinking>", "</thinking>"), ("<thought>", "</thought>"), ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"), ("<seed:think>", "</seed:think>"), ("◁think▷", "◁/think▷"),
    ("<|channel>thought", "<channel|>"),
)  # fmt: skip
# gpt-oss writes thought and answer into channels
ANALYSIS, FINAL = "<|channel|>analysis<|message|>", "<|channel|>final<|message|>"
# tokens that are a mark, or that a mark begins with
_MARKS = {mark for tags in _TAGS for mark in tags} | {"<|channel>", "<|channel|>", "<|message|>"}

_START, _END = (re.compile("|".join(map(re.escape, marks))) for marks in zip(*_TAGS, strict=True))
_OPENED = re.compile(rf"(?:{_START.pattern})\s*\Z")
_UP_TO_FINAL = re.compile(f".*{re.escape(FINAL)}", re.DOTALL)
_OTHER_CHANNEL = re.compile(r"<\|channel\|>(?:analysis|commentary)")


def decode_answer(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], answer: Sequence[int]) -> str:
    """The text of the tokens `answer`, which followed the tokens `prompt`.

    It holds no special tokens but those that mark a thought. If the prompt ends with the mark that begins a thought, as
    some chat templates do it, the text begins with that mark.
    """
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    special |= set(tokenizer.all_special_ids)
    left_out = special - {token for mark, token in tokenizer.get_added_vocab().items() if mark in _MARKS}
    opened = _OPENED.search(str(tokenizer.decode(list(prompt))))
    text = str(tokenizer.decode([token for token in answer if token not in left_out]))
    return opened.group() + text if opened else text


def without_thought(text: str) -> str | None:
    """The answer in `text`, without white space around it. None if a thought does not end, so that no answer begins."""
    text = text.strip()
    if final := _UP_TO_FINAL.match(text):
        text = text[final.end() :]
    elif _OTHER_CHANNEL.match(text):
        return None
    text = _without_blocks(text)
    ends = [end.end() for end in _END.finditer(text)]
    text = text[ends[-1] :].strip() if ends else text.strip()  # the mark that begins this thought is missing
    return None if _START.match(text) else text


def _without_blocks(text: str) -> str:
    """`text` without the thoughts that have both marks. It takes one pass, so that no text can make it slow."""
    closing, kept, at = dict(_TAGS), [], 0
    for start in _START.finditer(text):
        if start.start() < at or start.group() not in closing:
            continue
        end = text.find(closing[start.group()], start.end())
        if end < 0:
            del closing[start.group()]  # a later thought of this kind does not end either
        else:
            kept.append(text[at : start.start()])
            at = end + len(closing[start.group()])
    return "".join(kept) + text[at:]
