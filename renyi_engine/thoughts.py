"""What a model thinks before it answers is no part of its answer: how the two are kept apart."""

from __future__ import annotations

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

# how models mark a thought: most; some; Magistral; Command-A; Seed-OSS; Kimi; Gemma 4
_TAGS = (
    ("<think>", "</think>"), ("<thinking>", "</thinking>"), ("<thought>", "</thought>"), ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"), ("<seed:think>", "</seed:think>"), ("◁think▷", "◁/think▷"),
    ("<|channel>thought", "<channel|>"),
)  # fmt: skip
# gpt-oss writes thought and answer into channels
ANALYSIS, FINAL = "<|channel|>analysis<|message|>", "<|channel|>final<|message|>"
# tokens that are marks, or begin one
_MARKS = {mark for tags in _TAGS for mark in tags} | {"<|channel>", "<|channel|>", "<|message|>"}

_START, _END = ("|".join(map(re.escape, marks)) for marks in zip(*_TAGS, strict=True))
_BLOCK = re.compile("|".join(f"{re.escape(start)}.*?{re.escape(end)}" for start, end in _TAGS), re.DOTALL)
# a thought whose start is missing
_REST_OF_BLOCK = re.compile(f".*(?:{_END})", re.DOTALL)
_ENDLESS = re.compile(rf"\s*(?:{_START})")
_OPENED = re.compile(rf"(?:{_START})\s*\Z")
_UP_TO_FINAL = re.compile(f".*{re.escape(FINAL)}", re.DOTALL)
_OTHER_CHANNEL = re.compile(r"<\|channel\|>(?:analysis|commentary)")


def decode_answer(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], answer: Sequence[int]) -> str:
    """The text of `answer`, which followed `prompt`, without special tokens other than those that mark a thought.

    Where the prompt ends in the mark that begins a thought, as some chat templates write it, the text begins with it.
    """
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    special |= set(tokenizer.all_special_ids)
    left_out = special - {token for mark, token in tokenizer.get_added_vocab().items() if mark in _MARKS}
    opened = _OPENED.search(str(tokenizer.decode(list(prompt))))
    text = str(tokenizer.decode([token for token in answer if token not in left_out]))
    return opened.group() + text if opened else text


def without_thought(text: str) -> str | None:
    """The answer in `text`, without white space around it. None: a thought that does not end, so there is none yet."""
    text = text.strip()
    if final := _UP_TO_FINAL.match(text):
        text = text[final.end() :]
    elif _OTHER_CHANNEL.match(text):
        return None
    text = _REST_OF_BLOCK.sub("", _BLOCK.sub("", text))
    return None if _ENDLESS.match(text) else text.strip()
