"""What sets alpha: schedules against their formulas, controllers against simulated ensembles.

Layout: K particles, N examples.
"""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from hypothesis.extra.numpy import arrays

from renyi_engine.objectives.alpha import (
    MAX_FALL,
    MAX_RISE,
    MIN_ALPHA,
    POOL_STEPS,
    AlphaStarController,
    EssController,
    Schedule,
    alpha_of_ess,
    alpha_rule,
    mean_ess,
    parse_controller,
)
from renyi_kernels import use_backend

ALPHAS = st.floats(1e-3, 20.0)
LOGP = st.tuples(st.integers(1, 6), st.integers(1, 7)).flatmap(
    lambda shape: arrays(np.float64, shape, elements=st.floats(-60.0, 0.0) | st.sampled_from([0.0, -1.0, -np.inf]))
)


def gold_ess(logp: np.ndarray, alpha: float) -> float:
    """Mean over examples of (sum_k w)^2 / sum_k w^2 with w = exp(alpha s), one example after another."""
    sizes = []
    for column in logp.T:
        if np.isneginf(column).all():
            sizes.append(len(column))  # no particle explains it: all share alike
            continue
        weights = [math.exp(alpha * (s - column.max())) for s in column]
        sizes.append(sum(weights) ** 2 / sum(w * w for w in weights))
    return sum(sizes) / len(sizes)


# ---------------------------------------------------------------------- schedules


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("linear", [0.2, 0.5, 0.8, 1.1, 1.4, 1.4, 1.4]),
        ("cosine", [0.2, 0.8 - 0.6 * math.sqrt(0.5), 0.8, 0.8 + 0.6 * math.sqrt(0.5), 1.4, 1.4, 1.4]),
        ("constant", [1.4] * 7),
    ],
)
def test_a_schedule_goes_from_start_to_end_and_stays_there(name, expected):
    schedule = Schedule(name, 0.2, 1.4, num_steps=4)
    found = [schedule.at(step) for step in range(7)]
    assert found == pytest.approx(expected, rel=1e-15)
    assert found[4:] == [1.4] * 3
    assert [schedule.at(step) for step in (3, 0)] == [found[3], found[0]]  # of the step alone


@given(st.sampled_from(["linear", "cosine"]), ALPHAS, ALPHAS, st.integers(1, 50))
def test_a_schedule_never_turns_back_and_is_symmetric_about_its_middle(name, start, end, num_steps):
    schedule = Schedule(name, start, end, num_steps)
    values = [schedule.at(step) for step in range(num_steps + 1)]
    assert (values[0], values[-1]) == (start, end)
    assert (np.diff(values) * (end - start) >= -1e-12).all()
    np.testing.assert_allclose(np.add(values, values[::-1]), start + end, rtol=1e-12)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_a_schedule_of_no_steps_is_at_its_end_at_once(name):
    assert Schedule(name, 0.0, 0.7, 0).at(0) == 0.7


# ---------------------------------------------------------------------- effective sample size and its alpha


@given(LOGP, ALPHAS)
def test_the_mean_ess_is_that_of_the_definition(logp, alpha):
    assert mean_ess(torch.from_numpy(logp), alpha) == pytest.approx(gold_ess(logp, alpha), rel=1e-12)


@given(LOGP, ALPHAS, ALPHAS)
def test_the_mean_ess_falls_as_alpha_grows(logp, one, other):
    low, high = sorted((one, other))
    assert mean_ess(torch.from_numpy(logp), high) <= mean_ess(torch.from_numpy(logp), low) + 1e-12


@given(LOGP, st.floats(0.05, 0.95), ALPHAS, st.floats(1.01, 30.0))
def test_the_solve_meets_the_target_or_stops_at_the_nearer_end(logp, share, low, factor):
    high = low * factor
    target = 1 + share * (len(logp) - 1)
    alpha = alpha_of_ess(torch.from_numpy(logp), target, low, high)
    assert low <= alpha <= high
    found = gold_ess(logp, alpha)
    if alpha == high:
        assert found >= target - 1e-9
    elif alpha == low:
        assert found <= target + 1e-9
    else:
        assert found == pytest.approx(target, rel=1e-9)


def test_two_particles_have_the_alpha_that_can_be_worked_out_by_hand():
    # ESS 1.6 is r = 3/4 and 1/4, so alpha times the gap of 2.5 nats is log 3
    logp = torch.tensor([[-1.0], [-3.5]], dtype=torch.float64)
    assert alpha_of_ess(logp, 1.6, 0.01, 10.0) == pytest.approx(math.log(3) / 2.5, rel=1e-9)


def test_the_backend_of_the_training_is_no_matter():
    logp = torch.tensor([[-1.0, -2.0], [-3.5, -2.5]])
    with use_backend("triton"):
        assert mean_ess(logp, 0.5) == pytest.approx(gold_ess(logp.double().numpy(), 0.5), rel=1e-12)


def test_a_broken_particle_counts_as_one_that_explains_nothing():
    logp = torch.randn(4, 9, dtype=torch.float64)
    broken, impossible = logp.clone(), logp.clone()
    broken[2], impossible[2] = math.nan, -math.inf
    assert mean_ess(broken, 0.7) == mean_ess(impossible, 0.7) == pytest.approx(mean_ess(logp[[0, 1, 3]], 0.7))
    assert alpha_of_ess(broken, 2.0, 0.01, 50.0) == alpha_of_ess(impossible, 2.0, 0.01, 50.0)


# ---------------------------------------------------------------------- steering by the effective sample size


def steer(controller, steps):
    """alphas and mean ESS of the steps as training meets them; `steps` yields logp [K, N]."""
    alphas, sizes = [], []
    for number, logp in enumerate(steps):
        alphas.append(controller.at(number))
        sizes.append(mean_ess(logp, alphas[-1]))
        controller.observe(logp)
    return np.array(alphas), np.array(sizes)


def drifting(K, spread_nats, num_steps, *, growth=100, N=8, contested=0.6):
    """Particles that start alike and drift apart over `growth` steps, on the contested examples only."""
    generator = torch.Generator().manual_seed(K)
    positions = torch.randn(K, 64, generator=generator, dtype=torch.float64)
    positions[:, torch.rand(64, generator=generator) > contested] *= 0.01
    for step in range(num_steps):
        chosen = torch.randperm(64, generator=generator)[:N]
        yield -20 + spread_nats * min(1.0, step / growth) * positions[:, chosen]


@pytest.mark.parametrize(
    ("K", "target", "spread_nats", "alpha"),
    [(4, 0.6, 3.0, 0.8), (4, 0.75, 2.0, 0.8), (10, 0.5, 5.0, 0.1), (3, 0.8, 400.0, 1.5), (2, 0.7, 8.0, 1e-3)],
)
def test_a_drifting_ensemble_is_brought_to_the_target(K, target, spread_nats, alpha):
    controller = EssController(target, K, alpha, alpha_max=10.0)
    alphas, sizes = steer(controller, drifting(K, spread_nats, 300))
    assert abs(sizes[-150:].mean() / K - target) < 0.03
    change = alphas[1:] / alphas[:-1]
    assert change.max() <= MAX_RISE * (1 + 1e-12)
    assert change.min() >= (1 - 1e-12) / MAX_FALL
    assert 0 < alphas.min() <= alphas.max() <= 10.0


def test_identical_particles_raise_alpha_to_its_limit_and_no_further():
    alphas, sizes = steer(EssController(0.5, 3, 0.8, alpha_max=1.7), [torch.full((3, 5), -4.0)] * 20)
    expected = np.minimum(0.8 * MAX_RISE ** np.arange(20), 1.7)
    np.testing.assert_allclose(alphas, expected, rtol=1e-12)
    np.testing.assert_allclose(sizes, 3)


@pytest.mark.parametrize("worst", [-math.inf, math.nan, -1e30])
def test_particles_that_are_lost_lower_alpha_to_its_floor_and_no_further(worst):
    logp = torch.full((4, 5), -4.0)
    logp[1:] = worst
    alphas, _ = steer(EssController(0.5, 4, 0.8, alpha_max=1.7), [logp] * 120)
    assert alphas[-1] == MIN_ALPHA
    assert (np.diff(alphas) <= 0).all()


def test_examples_that_no_particle_explains_are_survived():
    alphas, _ = steer(EssController(0.5, 4, 0.8, 1.7), [torch.full((4, 5), -math.inf), torch.full((4, 5), math.nan)])
    assert np.isfinite(alphas).all()


def test_one_example_on_which_all_agree_hardly_moves_alpha():
    controller = EssController(0.8, 4, 0.8, alpha_max=10.0)
    steer(controller, drifting(4, 3.0, 150, contested=1.0))
    before = controller.alpha
    controller.observe(torch.zeros(4, 1))
    assert 1 < controller.alpha / before < 0.5 + 0.5 * MAX_RISE  # by itself, it would raise alpha as far as it may


def test_steps_beyond_the_pool_are_forgotten():
    controller = EssController(0.6, 4, 0.8, alpha_max=10.0)
    steer(controller, drifting(4, 400.0, 50, growth=1))
    steer(controller, drifting(4, 2.0, POOL_STEPS + 80, growth=1))
    fresh = EssController(0.6, 4, controller.alpha, alpha_max=10.0)
    recent = list(drifting(4, 2.0, POOL_STEPS + 80, growth=1))[-POOL_STEPS:]
    steer(fresh, recent)
    assert fresh.state()["logp_nats_of_steps"] == controller.state()["logp_nats_of_steps"]


def test_a_restored_controller_goes_on_bit_for_bit():
    steps = [logp.float() for logp in drifting(3, 3.0, 60, growth=20)]
    steps[10][1] = -math.inf
    whole, _ = steer(EssController(0.7, 3, 0.8, 2.0), steps)
    first = EssController(0.7, 3, 0.8, 2.0)
    begun, _ = steer(first, steps[:23])
    second = EssController(0.7, 3, 0.8, 2.0)
    second.restore(json.loads(json.dumps(first.state())))
    resumed, _ = steer(second, steps[23:])
    assert [*begun, *resumed] == whole.tolist()
    assert len(set(whole.tolist())) > 40


# ---------------------------------------------------------------------- staying above the critical alpha


def test_alpha_stays_a_margin_above_the_last_estimate_and_within_its_limits():
    estimates, asked = {0: 0.5, 3: -2.0, 6: 5.0, 9: math.inf, 12: 0.25}, []

    def estimate(step):
        asked.append(step)
        return estimates[step]

    controller = AlphaStarController(0.2, alpha_max=1.5, num_steps=3, estimate=estimate)
    alphas = [controller.at(step) for step in range(14)]
    assert asked == [0, 3, 6, 9, 12]
    assert alphas == pytest.approx([0.7] * 3 + [0.2] * 3 + [1.5] * 6 + [0.45] * 2)
    resumed = AlphaStarController(0.2, alpha_max=1.5, num_steps=3, estimate=estimate)
    resumed.restore(json.loads(json.dumps(controller.state())))
    assert resumed.at(14) == alphas[-1]


@pytest.mark.parametrize("margin", [-0.1, 2.0, math.nan])
def test_a_margin_that_leaves_no_room_for_an_estimate_is_refused(margin):
    with pytest.raises(ValueError, match=r"MARGIN of at least 0 and below alpha_max \(2\); got"):
        AlphaStarController(margin, 2.0, 5, float)


def test_a_warm_up_that_was_begun_goes_on_as_it_began_in_a_longer_run():
    begun, longer = Schedule("linear", 0.1, 0.9, 50), Schedule("linear", 0.1, 0.9, 100)
    longer.restore(json.loads(json.dumps(begun.state())))
    assert [longer.at(step) for step in (20, 49, 60)] == [begun.at(step) for step in (20, 49, 60)]


# ---------------------------------------------------------------------- the flag


def test_the_flag_reads_as_a_name_and_a_number():
    assert parse_controller("ess:0.6") == ("ess", 0.6)
    assert parse_controller("alpha-star:1e-1") == ("alpha-star", 0.1)


@pytest.mark.parametrize(
    "text", ["ess", "ess:", "ess:x", "ess:nan", "es:0.5", "0.5", "", "alpha_star:0.1", "ess:0.5:1"]
)
def test_another_flag_is_refused_with_both_forms(text):
    with pytest.raises(ValueError, match=r"alpha_controller: expected ess:TARGET or alpha-star:MARGIN") as error:
        parse_controller(text)
    assert repr(text) in str(error.value)


def test_what_sets_alpha_is_said_in_a_few_words():
    assert alpha_rule(0.8, "constant", 0.3, None) == "0.8"
    assert alpha_rule(0.8, "cosine", 0.3, None) == "cosine schedule from 0.3 to 0.8"
    assert alpha_rule(0.8, "constant", 0.0, "ess:0.6") == "ess:0.6"
