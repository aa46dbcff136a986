"""Weights of the particles are the best ones for the examples that they are fitted to, and always a distribution.

Layout: K particles, N examples.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from renyi_engine.objectives import averaged, fit_particle_weights
from renyi_engine.objectives.particle_weights import at_least
from renyi_kernels import renyi_reduce

MIXTURE = torch.tensor([0.55, 0.3, 0.1, 0.05], dtype=torch.float64)


def drawn(num_examples, weights=MIXTURE, apart=3.0, seed=0):
    """logp [K, N] of numbers that were drawn from the mixture of normal distributions around 0, `apart`, 2 * `apart`,
    ..."""
    generator = torch.Generator().manual_seed(seed)
    camps = torch.multinomial(weights, num_examples, replacement=True, generator=generator)
    x = apart * camps + torch.randn(num_examples, generator=generator, dtype=torch.float64)
    means = apart * torch.arange(len(weights), dtype=torch.float64)
    return -((x - means[:, None]) ** 2) / 2


def loss(logp, weights, alpha=1.0):
    return renyi_reduce(logp, alpha, weights=weights).loss.mean().item()


def test_the_weights_of_a_known_mixture_are_found_again():
    weights = fit_particle_weights(drawn(20_000))
    assert weights.dtype == torch.float64
    torch.testing.assert_close(weights, MIXTURE, rtol=0, atol=0.015)  # three standard deviations


@pytest.mark.parametrize("alpha", [1e-8, 1e-3, 0.3, 1.0, 2.5])
@pytest.mark.parametrize("apart", [0.03, 0.3, 3.0])
def test_no_other_weights_have_a_lower_loss(alpha, apart):
    logp = drawn(200, apart=apart)
    best = fit_particle_weights(logp, alpha)
    assert best.sum().item() == pytest.approx(1.0, abs=1e-14)
    for towards in [*torch.eye(4, dtype=torch.float64), torch.full((4,), 0.25, dtype=torch.float64)]:
        other = torch.lerp(best, towards, 0.01)  # the loss is convex
        assert loss(logp, other, alpha) >= loss(logp, best, alpha) - 1e-9 / max(alpha, 1.0)


@pytest.mark.parametrize("alpha", [0.3, 1.0, 1e12])
def test_a_weight_is_the_mean_responsibility(alpha):
    logp = drawn(300)
    weights = fit_particle_weights(logp, alpha)
    torch.testing.assert_close(
        renyi_reduce(logp, alpha, weights=weights).responsibilities.mean(dim=1), weights, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("floor", [0.0, 0.2])
def test_a_step_of_em_never_raises_the_loss(floor):
    logp, weights, losses = drawn(50, apart=1.0), torch.full((4,), 0.25, dtype=torch.float64), []
    for _ in range(30):
        losses.append(loss(logp, weights))
        responsibilities = renyi_reduce(logp, 1.0, weights=weights).responsibilities
        weights = averaged(weights, responsibilities, 1.0, floor)
    assert all(after <= before + 1e-14 for before, after in itertools.pairwise(losses))
    assert losses[-1] < losses[0] - 1e-3


def test_log_likelihoods_that_no_float_can_exponentiate_are_fitted():
    logp = torch.tensor([[-1e6, -2e6, -3e5], [-1e6, -2e6 - 5e3, -3e5 - 1e4], [-math.inf, -2e6, -math.inf]])
    weights = fit_particle_weights(logp)
    assert weights[1] < 1e-3
    assert weights.isfinite().all()


def test_particles_that_are_alike_share_their_weight():
    one = drawn(100, MIXTURE[:2] / MIXTURE[:2].sum())
    weights = fit_particle_weights(one[[0, 1, 1]])
    assert weights[1] == weights[2]
    assert weights[0].item() == pytest.approx(fit_particle_weights(one)[0].item(), abs=1e-4)


def test_a_particle_that_is_always_wrong_loses_its_weight_and_changes_no_other():
    logp = drawn(500)
    weights = fit_particle_weights(torch.cat([logp, logp.amin(dim=0, keepdim=True) - 3.0]))
    assert weights[4] < 1e-9
    torch.testing.assert_close(weights[:4], fit_particle_weights(logp), rtol=0, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.3, 1.0, 2.0])
def test_a_particle_without_which_the_loss_is_lower_gets_no_weight_at_all(alpha):
    logp = drawn(200)
    worse = torch.cat([logp, logp[:1] - 0.5])  # everywhere by half a nat
    found = fit_particle_weights(worse, alpha)
    assert found[-1] == 0
    assert found.sum().item() == pytest.approx(1.0, abs=1e-15)
    torch.testing.assert_close(found[:-1], fit_particle_weights(logp, alpha), rtol=0, atol=1e-3)
    # a weight that is small but needed stays: one example of many is explained by one particle alone
    needed = torch.zeros(2, 1000, dtype=torch.float64)
    needed[1], needed[1, 0], needed[0, 0] = -60.0, 0.0, -60.0
    assert fit_particle_weights(needed, 1.0)[1].item() == pytest.approx(1 / 1000, rel=1e-3)


def test_averaged_steps_on_small_batches_come_near_the_mixture():
    logp, weights = drawn(8 * 600), torch.full((4,), 0.25, dtype=torch.float64)
    for batch in logp.split(8, dim=1):
        responsibilities = renyi_reduce(batch, 0.8, weights=weights).responsibilities
        weights = averaged(weights, responsibilities, 0.02, 0.025)
    torch.testing.assert_close(weights, MIXTURE, rtol=0, atol=0.05)


# ---------------------------------------------------------------------- the floor


@pytest.mark.parametrize("floor", [0.0, 0.01, 0.05, 0.06, 0.2, 0.2499])
@pytest.mark.parametrize(
    "weights", [MIXTURE.tolist(), [1.0, 0.0, 0.0, 0.0], [0.25] * 4, [0.9, 0.06, 0.03, 0.01]], ids=str
)
def test_what_has_the_floor_is_a_distribution(weights, floor):
    weights = torch.tensor(weights, dtype=torch.float64)
    found = at_least(weights, floor)
    assert (found >= floor).all()
    assert found.sum().item() == pytest.approx(1.0, abs=1e-15)
    scaled = found > floor
    ratios = found[scaled] / weights[scaled]
    torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios))  # proportions of the others stay
    if (weights >= floor).all():
        torch.testing.assert_close(found, weights, rtol=0, atol=1e-15)


def test_ten_thousand_steps_leave_a_distribution():
    weights, generator = torch.full((7,), 1 / 7, dtype=torch.float64), torch.Generator().manual_seed(0)
    for _ in range(10_000):
        responsibilities = torch.softmax(20 * torch.randn(7, 2, generator=generator, dtype=torch.float64), dim=0)
        weights = averaged(weights, responsibilities, 0.3, 0.1 / 7)
    assert weights.sum().item() == pytest.approx(1.0, abs=1e-14)
    assert weights.min() >= 0.1 / 7


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"alpha": 0.0}, "alpha: at 0"),
        ({"alpha": -1.0}, "alpha: expected a finite number"),
        ({"logp": torch.zeros(4)}, r"logp: expected \[K, N\]"),
        ({"logp": torch.zeros(4, 0)}, r"logp: expected \[K, N\]"),
    ],
    ids=str,
)
def test_what_cannot_be_fitted_is_named(change, named):
    with pytest.raises(ValueError, match=named):
        fit_particle_weights(**{"logp": drawn(5)} | change)


def test_an_example_without_mass_is_named_by_its_row():
    logp = drawn(5)
    logp[:, 3] = -math.inf
    with pytest.raises(ValueError, match="no particle gives column 3 any mass"):
        fit_particle_weights(logp)
    with pytest.raises(ValueError, match="no particle gives row 17 any mass"):
        fit_particle_weights(logp, rows=[2, 5, 9, 17, 18])
    logp[1, 2] = math.nan
    with pytest.raises(ValueError, match="particle 1 gives row 9 the log-likelihood nan"):
        fit_particle_weights(logp, rows=[2, 5, 9, 17, 18])
