"""The priors equal their formulas, written out particle by particle in fp64. K particles."""

from __future__ import annotations

import math

import pytest
import torch

from renyi_engine.objectives.prior import potential, prior_term, smoothed_kl, squared_distances


def particles(num_particles: int, scale: float = 1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(num_particles)
    shapes = [(num_particles, 3, 5), (num_particles, 4, 2)]
    return [scale * torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


def flat(stacked: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([p.flatten(1) for p in stacked], dim=1)


def naive_smoothed_kl(phi: torch.Tensor, std: float, h: float) -> torch.Tensor:
    terms = []
    for k in range(len(phi)):
        kernel = torch.stack([torch.exp(-(phi[k] - phi[j]).square().sum() / (2 * h**2)) for j in range(len(phi))])
        log_prior = -phi[k].square().sum() / (2 * std**2)
        terms.append(kernel.mean().log() - log_prior)
    return torch.stack(terms).mean()


@pytest.mark.parametrize("num_particles", [1, 2, 5])
def test_potential_is_the_mean_squared_norm_over_twice_the_variance(num_particles):
    stacked = particles(num_particles)
    expected = flat(stacked).square().sum(dim=1).mean() / (2 * 0.7**2)
    torch.testing.assert_close(potential([p.flatten(1) for p in stacked], 0.7), expected)


@pytest.mark.parametrize("num_particles", [1, 2, 5])
def test_smoothed_kl_and_its_gradient_equal_the_formula(num_particles):
    stacked = [p.requires_grad_() for p in particles(num_particles, scale=0.4)]
    ours = smoothed_kl([p.flatten(1) for p in stacked], 0.7, 1.3)
    theirs = naive_smoothed_kl(flat(stacked), 0.7, 1.3)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, stacked), torch.autograd.grad(theirs, stacked))


@pytest.mark.parametrize("bandwidth", [2e-150, 1e-30, 1e30, 9e149])
def test_a_bandwidth_whose_square_fp32_does_not_hold_gives_the_limit(bandwidth):
    """Of a tiny one every particle is alone, of a huge one all are together: what pulls them apart has no gradient."""
    stacked = [p.flatten(1).float().requires_grad_() for p in particles(3)]
    ours, alone = smoothed_kl(stacked, 0.7, bandwidth), potential(stacked, 0.7)
    torch.testing.assert_close(ours, alone - (math.log(3) if bandwidth < 1 else 0.0))
    torch.testing.assert_close(torch.autograd.grad(ours, stacked), torch.autograd.grad(alone, stacked))


def test_median_heuristic_is_svgds_and_is_constant_to_the_derivative():
    stacked = [p.requires_grad_() for p in particles(4)]
    distances = torch.pdist(flat(stacked).detach()).square()
    h = math.sqrt(distances.median() / (2 * math.log(5)))
    ours = smoothed_kl([p.flatten(1) for p in stacked], 1.5, None)
    theirs = naive_smoothed_kl(flat(stacked), 1.5, h)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, stacked), torch.autograd.grad(theirs, stacked))


def test_one_particle_has_nothing_to_keep_away_from():
    stacked = [p.flatten(1) for p in particles(1)]
    torch.testing.assert_close(smoothed_kl(stacked, 0.6, None), potential(stacked, 0.6))


def test_descending_the_smoothed_kl_drives_close_particles_apart():
    stacked = [p[:1] + 0.05 * p for p in particles(3)]
    stacked = [p.flatten(1).requires_grad_() for p in stacked]
    before = squared_distances(stacked).sum()
    gradients = torch.autograd.grad(smoothed_kl(stacked, 1e6, 0.5), stacked)
    after = squared_distances([p - 1e-2 * g for p, g in zip(stacked, gradients, strict=True)]).sum()
    assert after > before


def test_distances_of_close_particles_far_from_zero_do_not_cancel_in_fp32():
    offsets = 1e-3 * torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    squared = squared_distances([100.0 + offsets])
    assert squared[0, 1].item() == pytest.approx(25e-6, rel=1e-2)


@pytest.mark.parametrize(("name", "function"), [("potential", potential), ("smoothed_kl", smoothed_kl)])
def test_the_term_is_scaled_by_lambda_over_n(name, function):
    stacked = particles(3)
    rest = (2.0,) if name == "potential" else (2.0, 0.9)
    term = prior_term(name, stacked, weight=0.3, num_examples=17, std=2.0, bandwidth=0.9)
    torch.testing.assert_close(term, 0.3 / 17 * function([p.flatten(1) for p in stacked], *rest))


def test_no_prior_is_zero_without_a_graph():
    stacked = [p.requires_grad_() for p in particles(2)]
    assert not prior_term("none", stacked, weight=1.0, num_examples=1, std=1.0, bandwidth=None).requires_grad


# ---------------------------------------------------------------------- a sick particle

SICK = {
    "NaN": lambda p: p.view(-1)[3:4].fill_(torch.nan),
    "infinite": lambda p: p.fill_(torch.inf),
    "one infinite value": lambda p: p.view(-1)[0:1].fill_(-torch.inf),
    "its square is infinite": lambda p: p.fill_(1e19),
    "the square of its distance is infinite": lambda p: p.fill_(4e18),
}


@pytest.mark.parametrize("kind", SICK)
@pytest.mark.parametrize("sick", [[1], [0, 3]], ids=str)
@pytest.mark.parametrize(("name", "bandwidth"), [("potential", None), ("smoothed_kl", None), ("smoothed_kl", 0.7)])
def test_a_sick_particle_leaves_the_others_the_update_that_they_have_without_it(kind, sick, name, bandwidth):
    """The gradients of K times the term, as training takes them."""
    everyone = [7.0 + p.float() for p in particles(5, scale=0.3)]
    sound = [k for k in range(5) if k not in sick]

    def gradients(stacked):
        leaves = [p.clone().requires_grad_() for p in stacked]
        term = prior_term(name, leaves, weight=1.0, num_examples=1, std=0.8, bandwidth=bandwidth)
        assert term.isfinite()
        return torch.autograd.grad(len(stacked[0]) * term, leaves)

    expected = gradients([p[sound] for p in everyone])
    for k in sick:
        for p in everyone:
            SICK[kind](p[k])
    for found, truth in zip(gradients(everyone), expected, strict=True):
        torch.testing.assert_close(found[sound], truth, rtol=1e-5, atol=1e-6)


def test_what_is_wrong_with_a_sick_particle_does_not_reach_a_bit_of_the_others():
    everyone = [p.float() for p in particles(4, scale=0.3)]

    def gradients(value):
        leaves = [p.clone() for p in everyone]
        for p in leaves:
            p[2] = value
            p.requires_grad_()
        return [
            g[[0, 1, 3]] for g in torch.autograd.grad(smoothed_kl([p.flatten(1) for p in leaves], 0.8, None), leaves)
        ]

    first = gradients(torch.nan)
    for value in (torch.inf, 1e20, -1e30):
        assert all(map(torch.equal, gradients(value), first))


def test_one_sound_particle_among_sick_ones_has_nothing_to_keep_away_from():
    stacked = [p.flatten(1) for p in particles(3)]
    for p in stacked:
        p[:2] = torch.nan
    torch.testing.assert_close(smoothed_kl(stacked, 0.6, None), potential(stacked, 0.6))


def test_a_particle_that_is_far_away_leaves_the_others_their_distances():
    stacked = [p.flatten(1).float() for p in particles(4, scale=0.3)]
    truth = squared_distances([p[:3].double() for p in stacked])
    for p in stacked:
        p[3] = 1e12
    torch.testing.assert_close(squared_distances(stacked)[:3, :3].double(), truth, rtol=1e-5, atol=1e-5)
