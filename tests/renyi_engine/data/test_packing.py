"""A packed row holds every sequence once, what sequences of a family begin with only once, and no padding."""

from __future__ import annotations

import torch
from hypothesis import given, strategies as st

from renyi_engine.data import Example, pack

IGNORED = -100


@st.composite
def examples(draw, beginning=()):
    """An example whose tokens begin with `beginning`; at least one label counts."""
    ids = [*beginning, *draw(st.lists(st.integers(3, 6), min_size=1 if beginning else 2, max_size=7))]
    learnt = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
    learnt[draw(st.integers(1, len(ids) - 1))] = True
    return Example(0, ids, [token if counts else IGNORED for token, counts in zip(ids, learnt, strict=True)])


@st.composite
def families(draw):
    beginning = draw(st.lists(st.integers(3, 6), max_size=6))
    return [draw(examples(beginning)) for _ in range(draw(st.integers(1, 3)))]


def texts_of(row):
    """For each token of a packed row, all tokens that it sees, itself last; and their positions."""
    tokens, positions = row["input_ids"][0].tolist(), row["position_ids"][0].tolist()
    parts, start = [], 0
    for length, prefix in row["segments"].tolist():
        seen = parts[prefix] if prefix >= 0 else ([], [])
        parts.append((seen[0] + tokens[start : start + length], seen[1] + positions[start : start + length]))
        for place in range(length):
            end = len(seen[0]) + place + 1
            yield parts[-1][0][:end], parts[-1][1][:end]
        start += length
    assert start == len(tokens)


@given(st.lists(families(), min_size=1, max_size=4))
def test_every_label_is_predicted_from_the_tokens_before_it(batch):
    row = pack(batch)
    seen = list(texts_of(row))
    labels, rows = row["labels"].tolist(), row["label_rows"].tolist()
    found = [
        [(seen[rows[place]], labels[place]) for place in places if place < len(labels)]
        for places in row["label_places"].tolist()
    ]
    expected = [
        [((e.input_ids[:t], list(range(t))), e.labels[t]) for t in range(1, len(e.labels)) if e.labels[t] != IGNORED]
        for family in batch
        for e in family
    ]
    assert found == expected


@given(st.lists(families(), min_size=1, max_size=4))
def test_no_token_stands_in_the_row_that_no_label_needs(batch):
    row = pack(batch)
    needed = 0
    for family in batch:
        reads = [e.input_ids[: max(t for t, label in enumerate(e.labels) if label != IGNORED)] for e in family]
        shared = 0
        while len(family) > 1 and all(len(read) > shared and read[shared] == reads[0][shared] for read in reads):
            shared += 1
        needed += shared + sum(len(read) - shared for read in reads)
    assert row["input_ids"].shape == row["position_ids"].shape == (1, needed)
    assert row["segments"][:, 0].min() > 0


def test_a_prompt_and_four_answers_of_one_token_are_the_prompt():
    prompt = list(range(3, 1003))
    family = [Example(0, [*prompt, answer], [IGNORED] * 1000 + [answer]) for answer in (7, 8, 9, 10)]
    row = pack([family])
    assert row["input_ids"].tolist() == [prompt]
    assert row["labels"].tolist() == [7, 8, 9, 10]
    assert row["label_rows"].tolist() == [999] * 4
    assert row["label_places"].equal(torch.arange(4)[:, None])
