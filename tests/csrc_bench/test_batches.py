"""The lengths of real data, and the batches that are made of them."""

from __future__ import annotations

import pytest

from csrc_bench import batches, bench_ragged_step
from renyi_kernels import IGNORE_INDEX

SHAPES = {shape["name"]: shape for shape in bench_ragged_step.shapes("cpu", tiny=False) if shape["K"] == 4}


def shape_of(data, labels="completion", pairs=False, B=8):
    return {"data": data, "labels": labels, "pairs": pairs, "B": B}


def mean_counts(shape, by_length):
    counted = [batches.counts(batch, shape) for batch in batches.batches_of(shape, by_length)]
    return {name: sum(counts[name] for counts in counted) / len(counted) for name in counted[0]}


@pytest.mark.parametrize(
    ("data", "pairs", "shares"),
    [
        ("hh_rlhf", False, (0.43, 0.30)),
        ("hh_rlhf", True, (0.40, 0.29)),
        ("mmlu", False, (0.38, 0.25)),
        ("tweets", False, (0.51, 0.42)),
        ("instructions", False, (0.68, 0.55)),
    ],
)
def test_a_third_to_three_quarters_of_a_padded_batch_is_padding(data, pairs, shares):
    """The shares of real tokens in batches of 8 and of 32, drawn at random."""
    for B, share in zip((8, 32), shares, strict=True):
        mean = mean_counts(shape_of(data, pairs=pairs, B=B), by_length=False)
        assert mean["real"] / mean["padded"] == pytest.approx(share, abs=0.015)


def test_batches_of_similar_length_hold_the_same_tokens_and_little_padding():
    for data in ("hh_rlhf", "mmlu", "tweets", "instructions"):
        mixed, grouped = (mean_counts(shape_of(data), by_length) for by_length in (False, True))
        assert grouped["real"] == mixed["real"]
        assert grouped["real"] / grouped["padded"] > 0.85


@pytest.mark.parametrize("by_length", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_the_batches_that_are_timed_have_as_many_tokens_as_the_mean_batch(name, by_length):
    mean = mean_counts(SHAPES[name], by_length)
    for batch in batches.typical(SHAPES[name], by_length):
        for kind, count in batches.counts(batch, SHAPES[name]).items():
            assert count == pytest.approx(mean[kind], rel=0.06), kind


def test_the_counts_are_those_of_the_batches_that_the_model_is_given():
    shape = shape_of("hh_rlhf", pairs=True)
    batch = batches.typical(shape, by_length=False)[0]
    families = batches.random_families(batch, 100, shape["labels"], seed=0)
    counts = batches.counts(batch, shape)
    padded, row = batches.padded(families), batches.padding_free(families)
    assert padded["attention_mask"].sum() == row["input_ids"].numel() == counts["real"]
    assert padded["input_ids"].numel() == counts["padded"]
    for labels in (padded["labels"], row["labels"]):
        assert (labels[:, 1:] != IGNORE_INDEX).sum() == counts["labelled"]


def test_a_family_shares_its_prompt_and_learns_its_completions():
    (family,) = batches.random_families([(3, 2, 4)], 1000, "completion", seed=0)
    chosen, rejected = family
    assert chosen.input_ids[:3] == rejected.input_ids[:3]
    assert [len(sequence.input_ids) for sequence in family] == [5, 7]
    assert all(sequence.labels == [IGNORE_INDEX] * 3 + sequence.input_ids[3:] for sequence in family)


def test_a_shortened_batch_is_ragged_and_every_sequence_has_a_label():
    for shape in SHAPES.values():
        few = batches.shortened(batches.typical(shape, by_length=False)[0], max_length=32)
        counts = batches.counts(few, shape)
        assert counts["real"] < counts["padded"] <= 33 * len(few) * (len(few[0]) - 1)
        assert all(batches.num_labels(p, n, shape["labels"]) > 0 for p, *both in few for n in both)


def test_padding_free_positions_begin_again_with_every_sequence_and_nothing_predicts_a_first_token():
    families = batches.random_families([(0, 3), (1, 2)], 100, "all", seed=0)
    row = batches.padding_free(families)
    assert row["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2]]
    assert (row["labels"][0] == IGNORE_INDEX).tolist() == [True, False, False] * 2
