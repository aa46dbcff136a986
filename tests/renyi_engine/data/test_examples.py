"""Batches and their order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from renyi_engine.data.batches import collate, pad_token_id
from renyi_engine.data.examples import MOST_TEXT, Dropped, Example, excerpt, tokenize
from renyi_engine.data.sampling import StepSampler
from renyi_engine.objectives.task import cut_rows, describe_rows


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40),
    size=st.integers(1, 28),
    grouped=st.booleans(),
    epoch=st.integers(0, 3),
)
def test_an_epoch_sees_every_example_once_in_steps_of_the_asked_size(lengths, size, grouped, epoch):
    sampler = StepSampler(lengths, size, seed=3, group_by_length=grouped)
    first = epoch * sampler.steps_per_epoch
    steps = [sampler.examples(first + i) for i in range(sampler.steps_per_epoch)]
    assert sorted(i for step in steps for i in step) == list(range(len(lengths)))
    assert all(len(step) == size for step in steps[:-1])


def test_the_order_depends_on_seed_and_step_alone():
    def order(seed, steps):
        sampler = StepSampler([1] * 30, 8, seed, False)
        return {step: sampler.examples(step) for step in steps}

    assert order(1, range(8)) == order(1, reversed(range(8)))
    torch.manual_seed(99)
    assert order(1, [5]) == {5: order(1, range(8))[5]}
    assert order(1, range(8)) != order(2, range(8))
    assert order(1, range(4))[0] != order(1, range(8))[4]  # the next epoch is shuffled anew


def test_grouping_by_length_leaves_less_padding():
    lengths = [1 + (37 * i) % 101 for i in range(200)]

    def padding(grouped):
        sampler = StepSampler(lengths, 8, 0, grouped)
        parts = [sampler.examples(s) for s in range(sampler.steps_per_epoch)]
        return sum(max(lengths[i] for i in part) * len(part) - sum(lengths[i] for i in part) for part in parts)

    assert padding(True) < 0.5 * padding(False)


def test_collate_pads_on_the_right_and_masks_what_it_pads():
    batch = collate([Example(0, [5, 6, 7], [-100, 6, 7]), Example(1, [8], [8])], pad_token_id=9)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]


def test_dropped_rows_are_counted_by_reason_and_nothing_left_is_an_error():
    def one(number, row):
        if row == "good":
            return Example(number, [1, 2], [1, 2])
        raise Dropped(f"it is {row}")

    examples, dropped = tokenize(["bad", "good", "bad", "ugly"], one, "dataset_name")
    assert [e.row for e in examples] == [1]
    assert dropped == {"it is bad": [0, 2], "it is ugly": [3]}
    with pytest.raises(ValueError, match=r"dataset_name: no row is left to use \(2 rows dropped \(0, 1\): it is bad\)"):
        tokenize(["bad", "bad"], one, "dataset_name")


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


def test_rows_that_were_cut_are_counted_and_named():
    whole, cut = Example.cut(3, [1, 2, 3], [-100, 2, 3], 3), Example.cut(5, [1, 2, 3], [-100, 2, 3], 2)
    assert cut == Example(5, [1, 2], [-100, 2], num_cut=1)
    assert cut_rows([whole, cut]) == [5]
    assert describe_rows([whole, cut], {"it is bad": [1]}) == [
        "1 rows dropped (1): it is bad",
        "1 rows cut off at max_length (5)",
    ]
    assert describe_rows([whole], {}) == []


def test_padding_falls_back_to_eos_and_then_gives_up():
    class Tokenizer:
        pad_token_id, eos_token_id = None, 0

    tokenizer = Tokenizer()
    assert pad_token_id(tokenizer) == 0
    tokenizer.eos_token_id = None
    with pytest.raises(ValueError, match="neither a pad nor an end-of-sequence token"):
        pad_token_id(tokenizer)
