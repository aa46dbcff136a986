"""Excerpts of an example's text, for a person to read. They mark the part that is learnt."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from renyi_engine.data.examples import Example
from renyi_kernels import IGNORE_INDEX

MOST_TEXT = 120
"""How many characters an excerpt shows before the first learnt token, and how many from there on."""


def marked(tokenizer: PreTrainedTokenizerBase, example: Example) -> list[tuple[str, bool]]:
    """The example's text in stretches, and for each stretch whether it is learnt."""
    stretches = []
    start = 0
    learnt = [label != IGNORE_INDEX for label in example.labels]
    for end in range(1, len(learnt) + 1):
        if end == len(learnt) or learnt[end] != learnt[start]:
            stretches.append((tokenizer.decode(example.input_ids[start:end]), learnt[start]))
            start = end
    return stretches


def excerpt(tokenizer: PreTrainedTokenizerBase, example: Example) -> str:
    """The end of the text before the first learnt token, and the start of the rest. What is learnt stands in [[ ]]."""
    stretches = marked(tokenizer, example)
    before = "" if stretches[0][1] else stretches.pop(0)[0]
    text = "..." + before[-MOST_TEXT:] if len(before) > MOST_TEXT else before
    room = MOST_TEXT
    for stretch, learnt in stretches:
        shown = stretch[:room] + ("..." if len(stretch) > room else "")
        text += f"[[{shown}]]" if learnt else shown
        room -= len(stretch)
        if room <= 0:
            break
    return " ".join(text.split())
