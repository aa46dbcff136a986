"""The order in which training sees its examples."""

from __future__ import annotations

import torch
from hypothesis import given, settings, strategies as st

from renyi_engine.data.sampling import StepSampler


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
