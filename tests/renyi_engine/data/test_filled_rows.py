"""Rows that are filled up have equal sizes, and their own sequences see and predict what they did before."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, strategies as st

from renyi_engine.data import Example, Filler, RowSizes, choose_sizes, fill, pack

from .test_packing import families, texts_of

batches = st.lists(st.lists(families(), min_size=2, max_size=2), min_size=1, max_size=5)


def predictions(row):
    """Of every sequence, (the tokens and positions that predict a label, the label)."""
    seen, labels, rows = list(texts_of(row)), row["labels"].tolist(), row["label_rows"].tolist()
    return [
        [(seen[rows[place]], labels[place]) for place in places if place < len(labels)]
        for places in row["label_places"].tolist()
    ]


def keys_of(row):
    """Of every part with queries, the tokens whose keys it sees, by `ends` and `keys`."""
    (_, *queries), (_, *ends) = row["ends"].tolist()
    keys = row["keys"].tolist() if "keys" in row else list(range(row["input_ids"].numel()))
    found, before = [], (0, 0)
    for here in zip(queries, ends, strict=True):
        if here[0] > before[0]:
            found.append((here[0] - before[0], keys[before[1] : here[1]]))
        before = here
    return found


def keys_by_segments(row):
    segments = row["segments"].tolist()
    starts = [0, *itertools.accumulate(length for length, _ in segments)]
    return [
        (
            length,
            [
                *(range(starts[prefix], starts[prefix + 1]) if prefix >= 0 else ()),
                *range(starts[part], starts[part + 1]),
            ],
        )
        for part, (length, prefix) in enumerate(segments)
        if length
    ]


@given(batches)
def test_every_sequence_of_a_filled_row_predicts_what_it_did(batches):
    rows = [pack(batch) for batch in batches]
    filler = Filler(map(RowSizes.of, rows))
    for row in rows:
        filled = filler(row)
        if filled is row:
            usual = {sizes.sequences for sizes in filler.sizes}
            assert len(row["label_places"]) not in usual
            continue
        assert predictions(filled) == predictions(row)
        assert keys_of(filled) == keys_by_segments(filled)
        assert keys_by_segments(filled)[: len(row["segments"])] == keys_by_segments(row)
        longest = [max(column) for column in zip(*((q, len(k)) for q, k in keys_of(filled)), strict=True)]
        assert all(length <= most for length, most in zip(longest, filled["longest"].tolist(), strict=True))


@given(batches)
def test_rows_filled_up_to_the_same_sizes_have_the_same_shapes(batches):
    rows = [pack(batch) for batch in batches]
    chosen, shapes = choose_sizes(map(RowSizes.of, rows), most=2), {}
    assert len(chosen) in (1, 2)
    for row in rows:
        fitting = [sizes for sizes in chosen if sizes.hold(RowSizes.of(row))]
        for sizes in fitting:
            filled = {name: (tensor.shape, tensor.dtype) for name, tensor in fill(row, sizes).items()}
            assert shapes.setdefault(sizes, filled) == filled
            assert filled["input_ids"][0] == (1, sizes.tokens)
        # the largest sizes hold all rows of as many sequences
        assert (chosen[-1] in fitting) == (len(row["label_places"]) == chosen[-1].sequences)


@given(batches)
def test_the_sizes_of_rows_together_are_those_of_one_row(batches):
    alone = [RowSizes.of(pack([family])) for batch in batches for family in batch]
    together = RowSizes.of(pack([family for batch in batches for family in batch]))
    assert RowSizes.together(alone) == together


@given(st.lists(st.integers(1, 40), min_size=1, max_size=7), st.integers(1, 3))
def test_no_other_sizes_would_need_less_filling(lengths, most):
    """Counted in units of 64 tokens, to a multiple of which rows are filled up."""
    rows = [RowSizes.of(pack([[Example(0, [5] * (64 * n + 1), [5] * (64 * n + 1))]])) for n in lengths]
    found = sorted(sizes.tokens // 64 for sizes in choose_sizes(rows, most))
    assert len(found) <= most

    def filled(sizes):
        return sum(min((size for size in sizes if size >= n), default=10**9) for n in lengths)

    best = min(filled(choice) for m in range(1, most + 1) for choice in itertools.combinations(set(lengths), m))
    assert filled(found) == best


def test_the_first_row_gets_the_largest_sizes():
    rows = [pack([[Example(0, [5] * n, [5] * n)]]) for n in (10, 500)]
    filler = Filler(map(RowSizes.of, rows))
    assert [filler(rows[0])["input_ids"].numel() for _ in range(2)] == [512, 64]


def test_a_row_that_does_not_fit_is_refused_and_left_alone_by_a_filler():
    small, large = (pack([[Example(0, [5] * n, [5] * n)]]) for n in (10, 500))
    filler = Filler([RowSizes.of(small)])
    assert filler(large) is large
    with pytest.raises(ValueError, match="sizes: expected sizes that hold a row of RowSizes"):
        fill(large, filler.sizes[0])
    # nothing else than its tokens is too large
    sizes = RowSizes.of(large)._replace(tokens=498, parts=40)
    assert not sizes.hold(RowSizes.of(large))


def test_filling_has_no_label_that_counts():
    row = pack([[Example(0, [5, 6, 7], [-100, 6, 7])]])
    filled = fill(row, RowSizes.of(row)._replace(tokens=64, parts=40, labels=9, labels_of_one=4))
    assert filled["label_places"].tolist() == [[0, 1, 9, 9]]
    assert filled["labels"].tolist()[:2] == row["labels"].tolist()
    assert filled["input_ids"].dtype == torch.int64
