"""When a loss is a spike."""

from __future__ import annotations

import math

import pytest

from renyi_engine.training.loss_spikes import HISTORY, remember, spike_limit


def test_the_limit_is_so_many_times_the_median():
    recent = [1.0] * 9 + [2.0] * 2 + [50.0] * 9
    assert len(recent) == HISTORY
    assert spike_limit(3.0, recent) == 6.0
    assert spike_limit(1.5, recent) == 3.0


@pytest.mark.parametrize(("threshold", "known"), [(None, HISTORY), (3.0, HISTORY - 1), (3.0, 0)])
def test_nothing_is_a_spike_without_a_threshold_or_before_enough_is_known(threshold, known):
    assert spike_limit(threshold, [1.0] * known) == math.inf


def test_the_last_ones_are_remembered_and_no_infinity():
    recent: list[float] = []
    for nll in range(HISTORY + 3):
        recent = remember(recent, float(nll))
        recent = remember(recent, math.inf)
    assert recent == [float(nll) for nll in range(3, HISTORY + 3)]
