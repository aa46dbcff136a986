"""When a loss is a spike."""

from __future__ import annotations

import math
import random
import statistics

import pytest
import torch

from renyi_engine.training.loss_spikes import HISTORY, RecentNlls

CPU = torch.device("cpu")
LEARNT = torch.tensor(True)


def limit(threshold, known) -> float:
    return RecentNlls(known, CPU).limit(threshold).item()


def test_the_limit_is_so_many_times_the_median():
    recent = [1.0] * 9 + [2.0] * 2 + [50.0] * 9
    assert len(recent) == HISTORY
    assert limit(3.0, recent) == 6.0
    assert limit(1.5, recent) == 3.0


def test_the_limit_is_the_same_number_as_in_plain_python():
    """So a run that an earlier version began goes on with the same spikes."""
    draw = random.Random(5)
    for _ in range(50):
        recent, threshold = [draw.lognormvariate(0, 1) for _ in range(HISTORY)], 1 + 9 * draw.random()
        assert limit(threshold, recent) == threshold * statistics.median(recent)


@pytest.mark.parametrize(("threshold", "known"), [(None, HISTORY), (3.0, HISTORY - 1), (3.0, 0)])
def test_nothing_is_a_spike_without_a_threshold_or_before_enough_is_known(threshold, known):
    assert limit(threshold, [1.0] * known) == math.inf


def test_the_last_ones_are_remembered_and_no_infinity():
    recent = RecentNlls([], CPU)
    for nll in range(HISTORY + 3):
        recent.remember(torch.tensor(float(nll)), LEARNT)
        for wrong in (math.inf, math.nan):
            recent.remember(torch.tensor(wrong), LEARNT)
    assert recent.known() == [float(nll) for nll in range(3, HISTORY + 3)]


def test_a_step_that_was_not_learnt_from_is_not_remembered():
    recent = RecentNlls([1.0, 2.0], CPU)
    recent.remember(torch.tensor(7.0), ~LEARNT)
    assert recent.known() == [1.0, 2.0]
    recent.remember(torch.tensor(3.0), LEARNT)
    assert recent.known() == [1.0, 2.0, 3.0]


def test_what_a_checkpoint_keeps_gives_the_same_limits_again():
    recent = RecentNlls([], CPU)
    for step in range(HISTORY + 5):
        recent.remember(torch.tensor(1.0 / (step + 3), dtype=torch.float64), LEARNT)
        again = RecentNlls(recent.known(), CPU)
        assert again.known() == recent.known()
        assert torch.equal(again.limit(2.5), recent.limit(2.5))
