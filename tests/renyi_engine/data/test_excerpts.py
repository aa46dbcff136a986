"""An excerpt shows what is learnt, and how the text before it ends."""

from __future__ import annotations

from renyi_engine.data.examples import Example
from renyi_engine.data.excerpts import MOST_TEXT, excerpt


def test_an_excerpt_brackets_what_is_scored_and_nothing_between(tokenizer):
    ids = tokenizer("ask yes but no end")["input_ids"]
    text = tokenizer.decode(ids)
    labels = [-100] * len(ids)
    for said in ("yes", "no"):
        start = text.index(said)
        labels[start : start + len(said)] = ids[start : start + len(said)]
    assert excerpt(tokenizer, Example(0, ids, labels)) == "ask [[yes]] but [[no]] end"
    assert excerpt(tokenizer, Example(0, ids, ids)) == f"[[{text}]]"
    long = tokenizer("b" * 200 + "a" * 200)["input_ids"]
    expected = f"...{'b' * MOST_TEXT}[[{'a' * MOST_TEXT}...]]"
    assert excerpt(tokenizer, Example(0, long, [-100] * 200 + long[200:])) == expected
