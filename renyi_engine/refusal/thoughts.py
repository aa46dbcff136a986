"""What a model thinks before it answers is no part of its answer."""

from __future__ import annotations

import re

# how models mark a thought: most; some; Magistral; Command-A; Seed-OSS; Kimi; Gemma 4
_TAGS = (
    ("<think>", "</think>"), ("<thinking>", "</thinking>"), ("<thought>", "</thought>"), ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"), ("<seed:think>", "</seed:think>"), ("◁think▷", "◁/think▷"),
    ("<|channel>thought", "<channel|>"),
)  # fmt: skip
_BLOCK = re.compile("|".join(f"{re.escape(start)}.*?{re.escape(end)}" for start, end in _TAGS), re.DOTALL)
# a thought that the generation prompt began
_REST_OF_BLOCK = re.compile(f".*(?:{'|'.join(re.escape(end) for _, end in _TAGS)})", re.DOTALL)
_ENDLESS = re.compile(rf"\s*(?:{'|'.join(re.escape(start) for start, _ in _TAGS)})")
# gpt-oss's channels, as they are and as they read without their special tokens: "analysisWe need ...assistantfinalYes."
_FINAL = re.compile(r".*<\|channel\|>final<\|message\|>|analysis(?=\w).*assistantfinal|final(?=[A-Z])", re.DOTALL)
_ANALYSIS = re.compile(r"<\|channel\|>(?:analysis|commentary)|analysis(?=\w)")


def without_thought(text: str) -> str | None:
    """The answer in `text`, without white space around it. None: a thought that does not end, so there is none yet."""
    text = text.strip()
    if final := _FINAL.match(text):
        text = text[final.end() :]
    elif _ANALYSIS.match(text):
        return None
    text = _REST_OF_BLOCK.sub("", _BLOCK.sub("", text))
    return None if _ENDLESS.match(text) else text.strip()
