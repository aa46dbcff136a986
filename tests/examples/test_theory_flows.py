"""Particles on a regression with two answers: where they split and what the priors do. K particles, N examples."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest
import torch

THEORY = Path(__file__).parents[2] / "examples" / "theory"


@pytest.fixture
def flows(monkeypatch):
    """The script, which belongs to no package."""
    monkeypatch.syspath_prepend(str(THEORY))
    monkeypatch.delitem(sys.modules, "flows", raising=False)
    return __import__("flows")


@pytest.fixture
def data(flows):
    return flows.make_data(seed=1)


def points(slopes, tolerance=1e-2):
    """Where particles [K, 1] are, those nearer than the tolerance counted once."""
    ordered = slopes.flatten().sort().values
    return ordered[torch.cat([torch.ones(1, dtype=torch.bool), ordered.diff() > tolerance])]


def close_to_zero(num_particles, size=1e-4):
    """Departures from the collapsed state that sum to 0."""
    start = torch.randn(num_particles, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return size * (start - start.mean())


@pytest.mark.parametrize("bandwidth", [0.05, 0.3])
@pytest.mark.parametrize("prior", ["potential", "smoothed_kl"])
def test_critical_alpha_is_where_the_curvature_of_the_objective_changes_its_sign(flows, data, prior, bandwidth):
    departures = close_to_zero(5, size=1.0)

    def curvature(alpha):
        def along(t):
            return flows.objective(t * departures, data, alpha, prior, bandwidth)

        return torch.autograd.functional.hessian(along, torch.zeros((), dtype=torch.float64)).item()

    at_zero, slope = curvature(0.0), curvature(1.0) - curvature(0.0)  # linear in alpha
    assert flows.critical_alpha(data, prior, bandwidth) == pytest.approx(-at_zero / slope, rel=1e-9)


@pytest.mark.parametrize("factor", [0.8, 1.25])
def test_departures_from_the_collapsed_state_grow_above_the_critical_alpha_and_shrink_below(flows, data, factor):
    start = close_to_zero(16)
    critical = flows.critical_alpha(data, "potential")
    paths = flows.flow(start, data, factor * critical, "potential", num_steps=40)
    squared_score = (data.x * data.y / flows.NOISE_STD**2).square().mean()
    per_step = 1 + flows.STEP * (factor - 1) * critical * squared_score
    torch.testing.assert_close(paths[-1], start * per_step**40, rtol=1e-4, atol=1e-9)


def test_particles_under_the_potential_fall_onto_one_point_below_the_critical_alpha_and_one_a_mode_above(flows, data):
    critical = flows.critical_alpha(data, "potential")
    below, above = (
        flows.flow(flows.spread_start(), data, factor * critical, "potential", num_steps=400)[-1]
        for factor in (0.8, 1.25)
    )
    assert points(below).tolist() == pytest.approx([0.0], abs=5e-2)
    assert len(points(above)) == 2
    assert (above[:8] < -0.3).all()
    assert (above[8:] > 0.3).all()


def test_the_smoothed_kl_parts_particles_that_have_all_but_collapsed_at_any_alpha(flows, data):
    assert flows.critical_alpha(data, "smoothed_kl") < 0
    critical = flows.critical_alpha(data, "potential")
    ends = {
        prior: flows.flow(close_to_zero(16), data, 0.8 * critical, prior, num_steps=300)[-1] for prior in flows.PRIORS
    }
    assert flows.spread(ends["potential"]) < 1e-5
    assert flows.spread(ends["smoothed_kl"]) > 0.1


def test_the_smoothed_kl_keeps_particles_of_one_mode_apart_where_the_potential_does_not(flows, data):
    alpha = 3 * flows.critical_alpha(data, "potential")
    upper = {
        prior: flows.flow(flows.spread_start(), data, alpha, prior, num_steps=500)[-1, 8:].flatten()
        for prior in flows.PRIORS
    }
    assert (upper["smoothed_kl"] > 0.4).all()
    assert upper["smoothed_kl"].sort().values.diff().min() > 0.02
    assert upper["potential"].amax() - upper["potential"].amin() < 1e-2


def test_the_median_heuristic_follows_the_modes_and_lets_their_particles_meet(flows, data):
    alpha = 3 * flows.critical_alpha(data, "potential")
    ends = flows.flow(flows.spread_start(), data, alpha, "smoothed_kl", bandwidth=None, num_steps=500)[-1]
    assert len(points(ends)) == 2


def test_the_script_draws_its_picture_and_prints_the_spreads(flows, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(flows, "flow", partial(flows.flow, num_steps=2))
    monkeypatch.setattr(sys, "argv", ["flows.py", "--output", str(tmp_path / "flows.png")])
    flows.main()
    assert (tmp_path / "flows.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert printed.count("smoothed_kl ") == 2
    assert printed.count("potential ") == 2
